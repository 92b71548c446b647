"""Checkpoints of Trainer on their way back: whether they can be used, and every tensor of them."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from nio_hf.errors import CheckpointError, Problem, one_line
from nio_hf.training.manifest import fault_of, has_manifest

_ANOTHER = f"Give a folder OUTPUT_DIR/{PREFIX_CHECKPOINT_DIR}-N, or auto for the newest that is whole"
_WEIGHTS = ("*model*", "global_step*")
"""Files or folders of which a checkpoint has one, whatever the strategy that it was trained with."""


def check_checkpoint(directory: Path, *, verify: bool) -> None:
    """Refuse a folder that is no checkpoint, or one that is not whole as far as can be known.

    Args:
        directory: that was asked for.
        verify: compare its files with the manifest, where it has one.

    Raises:
        CheckpointError: with what is wrong.
    """
    if not directory.is_dir():
        raise CheckpointError(Problem("resume_from_checkpoint", f"{str(directory)!r} is no folder", _ANOTHER))
    fault = fault_of(directory) if verify and has_manifest(directory) else None
    if fault is None and not any(any(directory.glob(pattern)) for pattern in _WEIGHTS):
        fault = "there are no weights in it"
    if fault is None:
        try:
            TrainerState.load_from_json(str(directory / TRAINER_STATE_NAME))
        except (OSError, ValueError, TypeError) as error:
            fault = f"{TRAINER_STATE_NAME} cannot be read ({one_line(error)})"
    if fault is not None:
        raise CheckpointError(Problem(str(directory), fault, _ANOTHER))


@contextlib.contextmanager
def plain_values_only(directory: str | None) -> Iterator[None]:
    """Say what it means when torch refuses to unpickle a file of a checkpoint.

    Raises:
        CheckpointError: in the place of UnpicklingError, whose text advises to let the code run.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        found = "Weights only load failed: a file holds more than tensors and plain values, and may run code"
        raise CheckpointError(Problem(str(directory), found, "Do not use it unless you know who wrote it")) from error


def can_reload(checkpoint: Path, model: nn.Module) -> bool:
    """Whether `reload` can restore this checkpoint of a transformers model."""
    weights = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    has_weights = any((checkpoint / name).is_file() for name in weights)
    return isinstance(model, PreTrainedModel) and (checkpoint / CONFIG_NAME).is_file() and has_weights


def reload(checkpoint: Path, model: PreTrainedModel) -> None:
    """Restore every tensor of a checkpoint, in place.

    Trainer loads with strict=False and without the conversion of key names that `from_pretrained` makes, which leaves
    most tensors of ViT, DeiT, BEiT, DINOv2 and Swin as they were.

    Raises:
        CheckpointError: where a tensor is missing, unexpected or of another shape, or the model class cannot be built
            from its config.
    """
    settings = {"config": copy.deepcopy(model.config), "dtype": model.dtype, "local_files_only": True}
    model_class = cast(Any, type(model))
    with torch.random.fork_rng(devices=[]):
        try:
            loaded, info = model_class.from_pretrained(checkpoint, output_loading_info=True, **settings)
        except TypeError as error:
            found = f"cannot be loaded into {model_class.__name__}: {error}"
            fix = "Give the arguments of its constructor beside config default values"
            raise CheckpointError(Problem(str(checkpoint), found, fix)) from error
    differences = {kind: keys for kind, keys in info.items() if keys}
    if differences:
        fix = "Resume with the model that wrote the checkpoint"
        raise CheckpointError(Problem(str(checkpoint), f"does not match {type(model).__name__}: {differences}", fix))
    model.load_state_dict(loaded.state_dict(), strict=True)
