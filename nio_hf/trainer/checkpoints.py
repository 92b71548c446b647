"""The initialised checkpoint with its mark."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file

import nio_hf
from nio_hf.core import NIOResult
from nio_hf.durable.manifest import fault_of, write_manifest
from nio_hf.durable.restoring import restore_all
from nio_hf.errors import CheckpointError, Problem
from nio_hf.files import ensure_writable, output_errors, sync_directory
from nio_hf.hub.run_folder import STATE_FORMAT, STATE_NAME, State, find_state, read_state, versions
from nio_hf.trainer.digests import fingerprint

logger = logging.getLogger(__name__)

MARK_KEY = "nio"
Task = dict[str, Any]
"""Everything that the scales of a run depend on, in plain values."""


def is_marked(model: nn.Module) -> bool:
    """Whether the model was loaded from an initialised checkpoint and still has its weights.

    A mark in the config that does not match the weights is reported.
    """
    mark = getattr(getattr(model, "config", None), MARK_KEY, None)
    if not isinstance(mark, dict):
        return False
    if mark.get("fingerprint") == fingerprint(model):
        return True
    logger.warning(
        "The config says that NIO %s initialised this model, but the weights are others: NIO runs again.",
        mark.get("version"),
    )
    return False


def origin_of(model: nn.Module) -> tuple[str | None, State | None]:
    """Where a marked model was loaded from: its name on the Hub, and the state of the NIO run that is beside it.

    Either is None where it is not known.
    """
    source = str(getattr(model, "name_or_path", "") or "")
    if not source:
        return None, None
    is_local = Path(source).is_dir()
    try:
        revision = getattr(getattr(model, "config", None), "_commit_hash", None)
        file = cached_file(source, STATE_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError:
        file = None
    return None if is_local else source, None if file is None else find_state(Path(file).parent)


def remove_mark(model: nn.Module) -> None:
    """Forget the mark: weights that are trained from here on are not the ones that it describes."""
    config = getattr(model, "config", None)
    if hasattr(config, MARK_KEY):
        delattr(config, MARK_KEY)


def describe_state(model: nn.Module, result: NIOResult, task: Task) -> State:
    """Content of `nio_state.json` about a NIO run.

    Args:
        model: Model with the scaled weights.
        result: Result of the run that scaled them.
        task: Task of the run, by which `load_initialised` knows it again.
    """
    return {
        "format": STATE_FORMAT,
        "mark": {"version": nio_hf.__version__, "fingerprint": fingerprint(model)},
        "task": task,
        "versions": versions(),
        "positions": _positions(model, result),
        "result": result.to_dict(),
    }


def save_initialised(
    model: nn.Module, state: State, directory: Path, processing_class: Any | None, describe: Callable[[Path], None]
) -> None:
    """Write weights, config with the mark, processor and `nio_state.json`, all or nothing.

    Args:
        model: Model with the scaled weights.
        state: State of the run that scaled them.
        directory: Directory, which is replaced where it exists.
        processing_class: Image processor or tokenizer, saved beside the weights.
        describe: Writes `nio_state.json`, and what else is to be told of the run, into a directory.

    Raises:
        OutputError: Where the directory cannot be written.
    """
    ensure_writable(directory.parent)
    temporary = directory.with_name(f"{directory.name}.partial")
    try:
        with output_errors(directory, trained=False):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            if isinstance(model, PreTrainedModel):
                model.save_pretrained(temporary)
                _add_mark(temporary / CONFIG_NAME, state["mark"])
            else:
                safetensors.torch.save_model(model, str(temporary / SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
            if processing_class is not None:
                processing_class.save_pretrained(temporary)
            describe(temporary)
            write_manifest(temporary)
            shutil.rmtree(directory, ignore_errors=True)
            temporary.replace(directory)
            sync_directory(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_initialised(directory: Path, model: nn.Module, task: Task) -> NIOResult | None:
    """Take over what `save_initialised` wrote, where it is whole and was made of the same model by the same task.

    Args:
        directory: Directory that was written.
        model: Model as it was before NIO; its weights become those of the directory.
        task: Task of the run that would have to be made.

    Returns:
        The result of that run; None, with the model as it was, where there is nothing that fits.
    """
    if not directory.is_dir():
        return None
    fault = fault_of(directory)
    if fault is not None:
        logger.warning("%s is passed over: %s.", directory, fault)
        return None
    try:
        state = read_state(directory)
        if state.get("task") != task:
            logger.warning(
                "%s is passed over: it was made of other weights or data, or with other settings.", directory
            )
            return None
        if not restore_all(directory, model):
            found = f"does not hold every tensor of {type(model).__name__}"
            raise CheckpointError(Problem(str(directory), found, "Initialise again"))
        return _named(NIOResult.from_dict(state["result"]), model, state["positions"])
    except CheckpointError as error:
        logger.warning("%s is passed over: %s", directory, error)
        return None


def _positions(model: nn.Module, result: NIOResult) -> dict[str, list[int]]:
    """Where the tensors of a result stand among the parameters of the model, which says more than a name elsewhere."""
    order = {name: position for position, (name, _) in enumerate(model.named_parameters())}
    return {key: [order[tensor.name] for tensor in getattr(result, key)] for key in ("tensors", "excluded")}


def _named(result: NIOResult, model: nn.Module, positions: dict[str, list[int]]) -> NIOResult:
    """A result that was read, with the names that its tensors have in the model."""
    names = [name for name, _ in model.named_parameters()]
    changes: dict[str, Any] = {
        key: tuple(
            dataclasses.replace(tensor, name=names[position])
            for tensor, position in zip(getattr(result, key), places, strict=True)
        )
        for key, places in positions.items()
    }
    return dataclasses.replace(result, **changes)


def _add_mark(config_file: Path, mark: dict[str, str]) -> None:
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config_file.write_text(json.dumps({**config, MARK_KEY: mark}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
