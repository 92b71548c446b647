"""Files in which a run describes itself, and the functions that read them."""

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

import yaml
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import nio_hf
from nio_hf.core import GradientInspection, NIOResult
from nio_hf.core.config import REPLACED
from nio_hf.durable.manifest import fault_of, has_manifest
from nio_hf.errors import CheckpointError, Problem, one_line
from nio_hf.report.run import Facts, Run

logger = logging.getLogger(__name__)

INIT_DIR_NAME = "_nio_init"
"""Folder of the initialised checkpoint. Its underscore keeps it out of `Trainer.push_to_hub`."""
STATE_NAME, STATE_FORMAT = "nio_state.json", 3
RUN_NAME, RUN_FORMAT = "nio_run.json", 1
RECIPE_NAME = "nio_recipe.yaml"
SAMPLE_NAME = "nio_sample.txt"
"""File with the text that a trained language model has written."""
INSPECTION_DIR_NAME, INSPECTION_NAME = "inspect", "inspection.json"
State = dict[str, Any]
"""Content of the file about a NIO run, in plain values."""
_GIVE = f"Give an output_dir of `nio-hf train` or `nio-hf init`, or its {INIT_DIR_NAME}"
_ELSEWHERE = {"output_dir", "run_name", "report_to", "hub_token", "push_to_hub", "hub_model_id", "logging_dir"}
"""Training arguments that say where a run was written and not what it computed, and private ones."""

# Writing


def describe_run(directory: Path, facts: Facts, recipe: str | None, training_seconds: float | None = None) -> None:
    """Write the description of a run beside its model, in place of the description of an earlier run.

    Args:
        directory: Directory of the model.
        facts: Facts of the run.
        recipe: Recipe as YAML; None without one.
        training_seconds: Seconds of all sessions of the training so far.
    """
    about = {"format": RUN_FORMAT, "facts": dataclasses.asdict(facts), "versions": versions()}
    _write_json(directory / RUN_NAME, {**about, "training_seconds": training_seconds})
    (directory / RECIPE_NAME).unlink(missing_ok=True)
    if recipe is not None:
        (directory / RECIPE_NAME).write_text(recipe, encoding="utf-8")


def write_state(state: State, directory: Path) -> None:
    """Write `nio_state.json` into a directory."""
    _write_json(directory / STATE_NAME, state)


def inspection_json(inspection: GradientInspection, steps: int) -> str:
    """Return the text of the file of an inspection, with the number of training steps of the model."""
    return json.dumps({"steps": steps, **inspection.to_dict()}, indent=1, allow_nan=False) + "\n"


def changed_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Return the training arguments that differ from their defaults, as plain values without tokens."""
    changed = {}
    for field in dataclasses.fields(args):
        value, default = (
            one.value if isinstance(one, enum.Enum) else one for one in (getattr(args, field.name, None), field.default)
        )
        # Trainer itself turns None into False and [].
        same = value == default or (default is None and value is False) or value == []
        is_told = field.init and field.name not in _ELSEWHERE and "token" not in field.name
        if is_told and not same and isinstance(value, str | int | float | bool | list):
            changed[field.name] = value
    return changed


def versions() -> dict[str, str]:
    """Return the versions of the libraries that the numbers depend on."""
    found = {"nio_hf": nio_hf.__version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "datasets"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


# Sharing


def shareable(value: Any) -> Any:
    """Return a value, nested ones included, with absolute paths cut down to their names."""
    if isinstance(value, Mapping):
        return {key: shareable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [shareable(entry) for entry in value]
    if isinstance(value, str) and len(value) > 1 and Path(value.removeprefix("file://")).is_absolute():
        return Path(value).name
    return value


def shareable_run(run: Run) -> Run:
    """Return a run with the absolute paths in its facts and its recipe cut down to their names."""
    facts = Facts(**shareable(dataclasses.asdict(run.facts)))
    return dataclasses.replace(run, facts=facts, recipe=None if run.recipe is None else _shareable_recipe(run.recipe))


def shareable_files(directory: Path) -> dict[str, bytes]:
    """Return {file name: content} of the files of a model that may hold absolute paths, with these cut down."""
    contents = {name: _read_json(directory / name) for name in (TRAINER_STATE_NAME, RUN_NAME)}
    files = {name: _json(shareable(content)).encode() for name, content in contents.items() if content is not None}
    recipe = _read_text(directory / RECIPE_NAME)
    return files if recipe is None else {**files, RECIPE_NAME: _shareable_recipe(recipe).encode()}


def _shareable_recipe(text: str) -> str:
    settings: str = yaml.safe_dump(shareable(yaml.safe_load(text)), sort_keys=False, allow_unicode=True)
    return settings


# Reading


def training_seconds(directory: Path) -> float:
    """Return the seconds of all sessions of a training up to a checkpoint; 0 if they are not known."""
    try:
        return float((_read_json(directory / RUN_NAME) or {}).get("training_seconds") or 0.0)
    except (CheckpointError, ValueError, TypeError):
        return 0.0


def read_state(directory: Path) -> State:
    """Read `nio_state.json` in a directory, and check that its result can be read.

    Raises:
        CheckpointError: A file that is missing, is not JSON, or has another format.
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


def find_state(directory: Path) -> State | None:
    """Read `nio_state.json` in a directory; None if it is missing or, with a warning, cannot be read."""
    try:
        return read_state(directory) if (directory / STATE_NAME).is_file() else None
    except CheckpointError as error:
        logger.warning("The result of NIO cannot be read: %s", error)
        return None


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a model as safetensors."""
    return any((folder / name).is_file() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))


def model_folder(directory: Path) -> Path:
    """Find the folder of a run's model: the folder itself, the last whole checkpoint, or the initialised checkpoint.

    Raises:
        CheckpointError: A folder without a model, or a checkpoint that is not whole.
    """
    for folder in filter(has_weights, _folders(directory)):
        fault = fault_of(folder) if has_manifest(folder) else None
        if fault is None:
            return folder
        if folder == directory:
            raise CheckpointError(Problem(str(folder), fault, "Give a checkpoint that is whole"))
    raise _nothing_in(directory, "model")


def read_run(directory: Path, name: str | None = None, progress: TrainerState | None = None) -> Run:
    """Read a run from its output directory, a checkpoint, or an initialised checkpoint.

    For a training that has not come to its end, the output directory stands for its last checkpoint.

    Args:
        directory: Directory to read.
        name: Name of the run; None for the name of the directory.
        progress: State of the training; None for the state in the folder.

    Raises:
        CheckpointError: A folder without a run, or with a file that cannot be read.
    """
    files = (STATE_NAME, RUN_NAME, TRAINER_STATE_NAME)
    described = (folder for folder in _folders(directory) if any((folder / name).is_file() for name in files))
    folder = next(described, None)
    if folder is None:
        raise _nothing_in(directory, "run")
    state = read_state(folder) if (folder / STATE_NAME).is_file() else None
    about = _read_json(folder / RUN_NAME) or {}
    saved = _read_json(folder / TRAINER_STATE_NAME) if progress is None else None
    inspection = _read_json(folder / INSPECTION_DIR_NAME / INSPECTION_NAME)
    try:
        progress = progress or TrainerState(**(saved or {}))
        facts = Facts(**about["facts"]) if about else _facts_of(_read_json(folder / CONFIG_NAME) or {})
        log, steps = progress.log_history, progress.global_step
        best = progress.best_global_step if facts.arguments.get("load_best_model_at_end") else None
        has_ended = any("train_runtime" in entry for entry in log)
        kept = best if has_ended and best is not None else steps
        metrics = final_metrics(log, kept)
        if about.get("training_seconds"):
            metrics["train_runtime"] = about["training_seconds"]
        # An inspection after another number of steps belongs to another run in the same folder.
        is_of_run = inspection is not None and inspection["steps"] == steps
        return Run(
            name=name or directory.resolve().name,
            facts=facts,
            has_ended=has_ended,
            kept_step=None if kept == steps else kept,
            result=None if state is None else NIOResult.from_dict(state["result"]),
            versions=about.get("versions") or (state or {}).get("versions", {}),
            steps=steps,
            max_steps=progress.max_steps,
            metrics=metrics,
            log_history=log,
            recipe=_read_text(folder / RECIPE_NAME),
            sample=_read_text(directory / SAMPLE_NAME) if has_ended else None,
            inspection=GradientInspection.from_dict(inspection) if inspection and is_of_run else None,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"cannot be read: {type(error).__name__}: {one_line(error)}"
        raise CheckpointError(Problem(str(folder), found, "Use the nio_hf version that wrote it")) from error


def final_metrics(log_history: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """Return the metrics `eval_*` and `train_*` of the weights of a step.

    Evaluations after the training take precedence over the evaluation at the step.
    """
    end = next((index for index, entry in enumerate(log_history) if "train_runtime" in entry), len(log_history))
    chosen = [entry for entry in log_history[:end] if entry.get("step") == step] + list(log_history[end:])
    values = {key: value for entry in chosen for key, value in entry.items() if key.startswith(("eval_", "train_"))}
    return {key: float(value) for key, value in values.items() if isinstance(value, int | float)}


def _folders(directory: Path) -> list[Path]:
    """Return the folders that may hold a run: its folder, its checkpoints from the last on, the initialised one."""

    def step(folder: Path) -> int:
        number = folder.name.rpartition("-")[2]
        return int(number) if number.isdecimal() else -1

    checkpoints = [path.parent for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE_NAME}")]
    return [directory, *sorted(checkpoints, key=step, reverse=True), directory / INIT_DIR_NAME]


def _nothing_in(directory: Path, what: str) -> CheckpointError:
    trials = sorted(path.name for path in directory.glob("run-*") if path.is_dir())
    found = f"no {what} in it, but trials of a search: {', '.join(trials)}" if trials else f"no {what} in it"
    if not directory.is_dir():
        found = "a file, not a folder" if directory.exists() else "no such folder"
    return CheckpointError(Problem(str(directory), found, _GIVE))


def _facts_of(config: Mapping[str, Any]) -> Facts:
    """Return the facts that the configuration of a model states."""
    names, classes = config.get("architectures") or ["model"], config.get("id2label")
    return Facts(names[0], config.get("model_type"), classes=None if classes is None else len(classes))


def _json(content: Any) -> str:
    return json.dumps(content, indent=1) + "\n"


def _write_json(path: Path, content: Any) -> None:
    path.write_text(_json(content), encoding="utf-8")


def _read_text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        text = _read_text(path)
        content = None if text is None else json.loads(text)
        if content is None or isinstance(content, dict):
            return content
        found = f"a {type(content).__name__}, not an object"
    except (OSError, ValueError) as error:
        found = f"cannot be read: {one_line(error)}"
    raise CheckpointError(Problem(str(path), found, "Run the command again that wrote it"))
