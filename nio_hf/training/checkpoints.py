"""The initialised checkpoint with its mark, and what NIO has learned on the way to it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file

import nio_hf
from nio_hf.core import NIOResult, NIOState
from nio_hf.core.config import REPLACED
from nio_hf.errors import CheckpointError, OutputError, Problem, one_line
from nio_hf.training.digests import fingerprint
from nio_hf.training.manifest import fault_of, sync_directory, write_atomically, write_manifest
from nio_hf.training.resuming import reload
from nio_hf.training.saving import output_errors

logger = logging.getLogger(__name__)

INIT_DIR_NAME = "_nio_init"
"""Its leading underscore keeps the initialised checkpoint out of `Trainer.push_to_hub`."""
STATE_NAME = "nio_state.json"
PROGRESS_NAME = "_nio_progress.json"
MARK_KEY = "nio"
STATE_FORMAT = 3
Task = dict[str, Any]
"""What a NIO run was given, in plain values: the same task gives the same scales."""
State = dict[str, Any]
"""What is written of a NIO run, in plain values."""


def plain_values(task: Task) -> Task:
    """A task as it comes back from JSON, so that it equals the one that was written."""
    values: Task = json.loads(json.dumps(task))
    return values


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
    """What `nio_state.json` holds of a NIO run.

    Args:
        model: with the scaled weights.
        result: of the run that scaled them.
        task: that the run was given, by which `load_initialised` knows it again.
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
        model: with the scaled weights.
        state: of the run that scaled them.
        directory: replaced where it exists.
        processing_class: image processor or tokenizer, saved beside the weights.
        describe: writes `nio_state.json`, and what else is to be told of the run, into a directory.

    Raises:
        OutputError: where the directory cannot be written.
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


def write_state(state: State, directory: Path) -> None:
    """Write `nio_state.json` into a directory."""
    (directory / STATE_NAME).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def load_initialised(directory: Path, model: nn.Module, task: Task) -> NIOResult | None:
    """Take over what `save_initialised` wrote, where it is whole and was made of the same model by the same task.

    Args:
        directory: that was written.
        model: as it was before NIO; its weights become those of the directory.
        task: of the run that would have to be made.

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
        if isinstance(model, PreTrainedModel):
            reload(directory, model)
        else:
            safetensors.torch.load_model(model, directory / SAFE_WEIGHTS_NAME)
        return _named(NIOResult.from_dict(state["result"]), model, state["positions"])
    except CheckpointError as error:
        logger.warning("%s is passed over: %s", directory, error)
        return None


def load_state(directory: Path) -> NIOResult:
    """The result that `save_initialised` wrote.

    Raises:
        CheckpointError: for a file that is missing, is not JSON, or has another format.
    """
    return NIOResult.from_dict(read_state(directory)["result"])


def save_progress(state: NIOState, directory: Path, task: Task) -> None:
    """Write what a NIO run has learned so far into a directory, in place of what is there.

    Args:
        state: of the run.
        directory: of the training.
        task: that the run was given, by which `load_progress` knows it again.

    Raises:
        OutputError: where it cannot be written.
    """
    content = {"format": STATE_FORMAT, "task": task, "state": state.to_dict()}
    with output_errors(directory / PROGRESS_NAME, trained=False):
        write_atomically(directory / PROGRESS_NAME, json.dumps(content) + "\n")


def load_progress(directory: Path, task: Task) -> NIOState | None:
    """What `save_progress` wrote, where it is of the same task; else None."""
    path = directory / PROGRESS_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] == STATE_FORMAT and content["task"] == task:
            return NIOState.from_dict(content["state"])
        logger.warning("%s is passed over: it is of other weights, data or settings.", path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is passed over: %s.", path, one_line(error))
    return None


def ensure_writable(directory: Path, needed: int = 0) -> None:
    """Create a directory and try to write into it.

    Args:
        directory: to create.
        needed: bytes that are going to be written.

    Raises:
        OutputError: where that fails, or there is less room than needed.
    """
    fix = "Choose an output_dir that you can write to"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise OutputError(Problem(str(directory), str(error), fix)) from error
    if free < needed:
        found = f"{free / 2**20:,.0f} MiB are free, a run needs at least {needed / 2**20:,.0f} MiB for its checkpoints"
        raise OutputError(Problem(str(directory), found, "Free space or choose another output_dir"))


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    packages = ("torch", "transformers", "accelerate", "datasets")
    installed = {name: importlib.metadata.version(name) for name in packages}
    return {"nio_hf": nio_hf.__version__, "python": platform.python_version(), **installed}


def find_state(directory: Path) -> State | None:
    """As [`read_state`]; None where there is none that can be read."""
    if not (directory / STATE_NAME).is_file():
        return None
    try:
        return read_state(directory)
    except CheckpointError as error:
        logger.warning("What NIO did is not known here: %s", error)
        return None


def read_state(directory: Path) -> State:
    """All of `nio_state.json` in a directory; its result can be read.

    Raises:
        CheckpointError: for a file that is missing, is not JSON, or has another format.
    """
    path = directory / STATE_NAME
    try:
        state: State = json.loads(path.read_text(encoding="utf-8"))
        if state["format"] == STATE_FORMAT:
            NIOResult.from_dict(state["result"])
            return state
        former = ", ".join(f"nio_{name}" for name in state.get("result", {}).get("config", {}) if name in REPLACED)
        found = f"format {state['format']}, known is {STATE_FORMAT}"
        found += f", with settings of a former version: {former}" if former else ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
    raise CheckpointError(Problem(str(path), found, "Initialise again, or use the nio_hf version that wrote it"))


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
