"""Reading checkpoints: restore every tensor of a model, and run no code.

`save_pretrained` writes the tensor names of the published checkpoints, a model in memory has the names of the installed
transformers, and Trainer loads the one into the other with strict=False: most tensors of ViT, DeiT, BEiT, DINOv2, Swin
and others stay as they are. `from_pretrained` knows the conversion.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from nio_hf.errors import CheckpointError, Problem, listed

logger = logging.getLogger(__name__)

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_FORBID = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def restore(directory: Path, model: nn.Module) -> bool:
    """Restore every tensor of a model in place if this takes a conversion; a warning names a tensor that is missing.

    Args:
        directory: Folder with the weights as safetensors.
        model: Model, unwrapped and whole on this process.

    Returns:
        Whether the model was restored: not if the names in the file are those of the model, which Trainer restores.

    Raises:
        CheckpointError: A tensor with another shape.
    """
    own, shapes = model.state_dict(), dict[str, torch.Size]()
    for path in _files(directory):
        with safetensors.safe_open(path, framework="pt") as file:
            shapes |= {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    fitting = [name for name, shape in shapes.items() if name in own and own[name].shape == shape]
    if not shapes or (not shapes.keys() - own.keys() and not _names_without(fitting, own)):
        return False
    tensors, missing = _tensors_for(model, directory)
    if missing:
        logger.warning("%s does not hold %s: they stay as they are.", directory, listed(missing, 1))
    model.load_state_dict(tensors, strict=False)
    return True


def restore_all(directory: Path, model: nn.Module) -> bool:
    """Restore every tensor of a model in place; if one is missing, leave the model as it is and return False."""
    tensors, missing = _tensors_for(model, directory)
    if not missing:
        model.load_state_dict(tensors, strict=False)
    return not missing


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Let torch.load read only tensors and the plain classes of a DeepSpeed checkpoint within the context.

    DeepSpeed asks for `weights_only=False`, which would run any code in the file.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    former = {name: os.environ.pop(name, None) for name in (_FORCE, _FORBID)}
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]):
            yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in former.items() if value is not None})


@contextlib.contextmanager
def unpickling_errors(checkpoint: Path | None) -> Iterator[None]:
    """Explain that torch refuses to unpickle a file of a checkpoint; the message of torch advises to run its code.

    Raises:
        CheckpointError: An UnpicklingError of torch.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        found = "Weights only load failed: a file holds more than tensors and plain values, and may run code"
        raise CheckpointError(Problem(str(checkpoint), found, "Do not use it unless you know who wrote it")) from error


def _tensors_for(model: nn.Module, directory: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of a checkpoint by their names in a model, and the names in the model without a tensor.

    Tensors of the stock class of the model come from `from_pretrained`, and those that the user has added or replaced
    come from the file by their names.

    Raises:
        CheckpointError: A tensor that the model lacks and that has another shape in the checkpoint.
    """
    own, saved = model.state_dict(), dict[str, Tensor]()
    for file in _files(directory):
        saved |= safetensors.torch.load_file(file)
    converted, other_shapes = _convert(directory, model, saved)
    found = [*saved.items(), *converted.items()]
    tensors = {name: tensor for name, tensor in found if name in own and own[name].shape == tensor.shape}
    missing = _names_without(tensors, own)
    for name in missing:
        shape = other_shapes.get(name, saved[name].shape if name in saved else own[name].shape)
        if shape != own[name].shape:
            text = f"holds {name} with shape {tuple(shape)}, the model has {tuple(own[name].shape)}"
            raise CheckpointError(Problem(str(directory), text, "Resume with the model that wrote it"))
    return tensors, missing


def _files(directory: Path) -> list[Path]:
    """Return the safetensors files of the model in a folder."""
    index, names = directory / SAFE_WEIGHTS_INDEX_NAME, {SAFE_WEIGHTS_NAME}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [directory / name for name in sorted(names) if (directory / name).is_file()]


def _names_without(tensors: Iterable[str], own: dict[str, Tensor]) -> list[str]:
    """Return the names in a model that would not be restored, neither directly nor by shared memory."""
    named = set(tensors)
    restored = {own[name].data_ptr() for name in named}
    return [name for name, tensor in own.items() if name not in named and tensor.data_ptr() not in restored]


def _convert(
    directory: Path, model: nn.Module, saved: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, torch.Size]]:
    """Load a checkpoint by `from_pretrained` of the model's stock class.

    Returns:
        {name in memory: tensor}, and {name: shape in the checkpoint} of tensors whose shape contradicts the config.
    """
    bases = [base for base in type(model).__mro__ if base.__module__.startswith("transformers.models.")]
    if not bases or not isinstance(model, PreTrainedModel):
        return {}, {}
    # The widest precision of the file holds the values of all its tensors exactly.
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in saved.values()) else torch.float32
    settings: dict[str, Any] = {"config": copy.deepcopy(model.config), "dtype": dtype, "local_files_only": True}
    stock: Any = bases[0]
    with torch.random.fork_rng(devices=[]):
        try:
            loaded, info = stock.from_pretrained(
                directory, output_loading_info=True, ignore_mismatched_sizes=True, **settings
            )
        except (TypeError, ValueError, RuntimeError, OSError) as error:
            logger.info("%s is not converted: %s", directory, error)
            return {}, {}
    other_shapes = {name: torch.Size(in_file) for name, in_file, _ in info["mismatched_keys"]}
    made_anew = {*info["missing_keys"], *other_shapes}
    tensors = cast(dict[str, Tensor], loaded.state_dict())
    return {name: tensor for name, tensor in tensors.items() if name not in made_anew}, other_shapes
