"""What a run writes about itself into its folders, and how it is read from there."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib.metadata
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import nio_hf
from nio_hf.core import GradientInspection, NIOResult
from nio_hf.core.config import REPLACED
from nio_hf.durable.manifest import fault_of, has_manifest
from nio_hf.errors import CheckpointError, Problem, one_line
from nio_hf.hub.sharing import shareable, shareable_recipe
from nio_hf.report.run import Facts, Run

logger = logging.getLogger(__name__)

INIT_DIR_NAME = "_nio_init"
"""Its leading underscore keeps the initialised checkpoint out of `Trainer.push_to_hub`."""
STATE_NAME, STATE_FORMAT = "nio_state.json", 3
State = dict[str, Any]
"""What is written of a NIO run, in plain values."""
RUN_NAME = "nio_run.json"
RECIPE_NAME = "nio_recipe.yaml"
SAMPLE_NAME = "nio_sample.txt"
"""Text that a trained language model has written."""
INSPECTION_DIR_NAME = "inspect"
INSPECTION_NAME = "inspection.json"
RUN_FORMAT = 1
_GIVE = f"Give an output_dir of `nio-hf train` or `nio-hf init`, or its {INIT_DIR_NAME}"

_LEFT_OUT = {"output_dir", "run_name", "report_to", "hub_token", "push_to_hub", "hub_model_id", "logging_dir"}
"""Arguments that say where a run was written, not what it computed, and what is nobody's business."""


def describe_run(directory: Path, facts: Facts, recipe: str | None, training_seconds: float | None = None) -> None:
    """Write beside a model what it takes to tell how it came about.

    What an earlier run has written there is replaced, or removed where this one has nothing of the kind.

    Args:
        directory: of the model.
        facts: of the run.
        recipe: as YAML, where there is one.
        training_seconds: of all sessions of the training so far.
    """
    content = {
        "format": RUN_FORMAT,
        "facts": dataclasses.asdict(facts),
        "versions": versions(),
        "training_seconds": training_seconds,
    }
    (directory / RUN_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (directory / RECIPE_NAME).unlink(missing_ok=True)
    if recipe is not None:
        (directory / RECIPE_NAME).write_text(recipe, encoding="utf-8")


def training_seconds(directory: Path) -> float:
    """Seconds of all sessions of a training up to a checkpoint; 0 where that is not known."""
    try:
        return float((_read_json(directory / RUN_NAME) or {}).get("training_seconds") or 0.0)
    except (CheckpointError, ValueError, TypeError):
        return 0.0


def shareable_files(directory: Path) -> dict[str, bytes]:
    """{file name: content} of the files of a model's folder that may hold absolute paths, with them cut down."""
    files = {}
    for name in (TRAINER_STATE_NAME, RUN_NAME):
        content = _read_json(directory / name)
        if content is not None:
            files[name] = (json.dumps(shareable(content), indent=1) + "\n").encode()
    recipe = directory / RECIPE_NAME
    if recipe.is_file():
        files[RECIPE_NAME] = shareable_recipe(recipe.read_text(encoding="utf-8")).encode()
    return files


def inspection_json(inspection: GradientInspection, steps: int) -> str:
    """An inspection as the text of its file, with the steps that the model was trained for."""
    return json.dumps({"steps": steps, **inspection.to_dict()}, indent=1, allow_nan=False) + "\n"


def changed_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The training arguments that differ from their defaults, as plain values without tokens."""
    changed = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name, None)
        value = value.value if isinstance(value, enum.Enum) else value
        default = field.default.value if isinstance(field.default, enum.Enum) else field.default
        plain = isinstance(value, str | int | float | bool | list)
        # Trainer itself turns None into these.
        same = value == default or (default is None and value is False) or value == []
        if field.init and plain and not same and field.name not in _LEFT_OUT and "token" not in field.name:
            changed[field.name] = value
    return changed


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, as far as it is installed."""
    found = {"nio_hf": nio_hf.__version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "datasets"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def write_state(state: State, directory: Path) -> None:
    """Write `nio_state.json` into a directory."""
    (directory / STATE_NAME).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


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


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a whole model as safetensors."""
    return any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


def model_folder(directory: Path) -> Path:
    """Where in the folder of a run its model is: there, else in the last whole checkpoint, else the initialised one.

    Raises:
        CheckpointError: where there is none, or the folder itself is a checkpoint that is not whole.
    """
    for folder in _folders(directory):
        if not has_weights(folder):
            continue
        fault = fault_of(folder) if has_manifest(folder) else None
        if fault is None:
            return folder
        if folder == directory:
            raise CheckpointError(Problem(str(folder), fault, "Give a checkpoint that is whole"))
    raise CheckpointError(Problem(str(directory), _missing(directory, "model"), _GIVE))


def read_run(directory: Path, name: str | None = None, progress: TrainerState | None = None) -> Run:
    """What a folder holds of a run: an output directory, a checkpoint, or an initialised checkpoint.

    Of an output directory whose training has not come to its end, that is its last checkpoint.

    Args:
        directory: that was written.
        name: of the run; None for that of the directory.
        progress: of the training; None for what the folder says.

    Raises:
        CheckpointError: where there is nothing of a run, or a file of it cannot be read.
    """
    folder = _described_folder(directory)
    state = read_state(folder) if (folder / STATE_NAME).is_file() else None
    about = _read_json(folder / RUN_NAME) or {}
    progress = progress or _read_progress(folder / TRAINER_STATE_NAME)
    inspection = _read_json(directory / INSPECTION_DIR_NAME / INSPECTION_NAME)
    recipe, sample = folder / RECIPE_NAME, directory / SAMPLE_NAME
    try:
        facts = Facts(**about["facts"]) if about else _facts_of_config(folder / CONFIG_NAME)
        best = progress.best_global_step if facts.arguments.get("load_best_model_at_end") else None
        has_ended = any("train_runtime" in entry for entry in progress.log_history)
        kept = best if has_ended and best is not None else progress.global_step
        metrics = final_metrics(progress.log_history, kept)
        if about.get("training_seconds"):
            metrics["train_runtime"] = about["training_seconds"]
        return Run(
            name=name or directory.resolve().name,
            facts=facts,
            has_ended=has_ended,
            kept_step=None if kept == progress.global_step else kept,
            result=None if state is None else NIOResult.from_dict(state["result"]),
            versions=about.get("versions") or (state or {}).get("versions", {}),
            steps=progress.global_step,
            max_steps=progress.max_steps,
            metrics=metrics,
            log_history=progress.log_history,
            recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
            sample=sample.read_text(encoding="utf-8") if has_ended and sample.is_file() else None,
            # One of a model that was trained for another number of steps is of another run in the same folder.
            inspection=GradientInspection.from_dict(inspection)
            if inspection is not None and inspection["steps"] == progress.global_step
            else None,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"cannot be read: {type(error).__name__}: {one_line(error)}"
        raise CheckpointError(Problem(str(folder), found, "Use the nio_hf version that wrote it")) from error


def final_metrics(log_history: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """The metrics of the weights that a training, or a checkpoint of it, holds.

    Args:
        log_history: of the Trainer.
        step: that the weights are of.

    Returns:
        `eval_*` and `train_*`: those of evaluations after the training, and what they lack of that at `step`.
    """
    end = next((index for index, entry in enumerate(log_history) if "train_runtime" in entry), len(log_history))
    chosen = [entry for entry in log_history[:end] if entry.get("step") == step] + list(log_history[end:])
    return {
        key: float(value)
        for entry in chosen
        for key, value in entry.items()
        if key.startswith(("eval_", "train_")) and isinstance(value, int | float)
    }


def _missing(directory: Path, what: str) -> str:
    trials = sorted(path.name for path in directory.glob("run-*") if path.is_dir())
    if trials:
        return f"no {what} in it, but those of a search: {', '.join(trials)}"
    if directory.is_dir():
        return f"no {what} in it"
    return "a file, not a folder" if directory.exists() else "no such folder"


def _folders(directory: Path) -> list[Path]:
    """Where a run may be: in its folder, else in its last checkpoint, else in the initialised one."""
    checkpoints = sorted(directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}"), key=_step, reverse=True)
    return [directory, *(path.parent for path in checkpoints), directory / INIT_DIR_NAME]


def _described_folder(directory: Path) -> Path:
    for folder in _folders(directory):
        if any((folder / name).is_file() for name in (STATE_NAME, RUN_NAME, TRAINER_STATE_NAME)):
            return folder
    raise CheckpointError(Problem(str(directory), _missing(directory, "run"), _GIVE))


def _step(path: Path) -> int:
    number = path.parent.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
        found = f"a {type(content).__name__}, not an object"
    except (OSError, ValueError) as error:
        found = f"cannot be read: {one_line(error)}"
    raise CheckpointError(Problem(str(path), found, "Run the command again that wrote it"))


def _read_progress(path: Path) -> TrainerState:
    if not path.is_file():
        return TrainerState()
    try:
        progress: TrainerState = TrainerState.load_from_json(str(path))
        return progress
    except (OSError, ValueError, TypeError) as error:
        found = f"cannot be read: {one_line(error)}"
        raise CheckpointError(Problem(str(path), found, "Give the folder of a checkpoint that is whole")) from error


def _facts_of_config(path: Path) -> Facts:
    """What the configuration of a model tells, where nothing else does."""
    config = _read_json(path) or {}
    classes = config.get("id2label")
    return Facts(
        model=(config.get("architectures") or ["model"])[0],
        model_type=config.get("model_type"),
        classes=None if classes is None else len(classes),
    )
