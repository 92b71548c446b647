"""From a YAML file and the command line to a checked recipe, with every problem reported at once."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nio_hf.core.config import replaced_setting
from nio_hf.errors import ConfigError, Problem, RecipeError, one_line
from nio_hf.metrics import CAUSAL_LM, IMAGE_CLASSIFICATION, MASKED_LM, METRICS, Metric
from nio_hf.recipe.catalog import find_recipe
from nio_hf.recipe.layering import merge, read_layers, settings_yaml
from nio_hf.recipe.model_checks import model_problems
from nio_hf.recipe.optimizer_checks import optimizer_problems
from nio_hf.recipe.ranges import range_problems
from nio_hf.recipe.settings import (
    AugmentationSettings,
    DataSettings,
    ModelSettings,
    OptimizationSettings,
    TextSettings,
)
from nio_hf.recipe.strict_yaml import Setting, read_overrides
from nio_hf.recipe.tasks import find_task, task_problems
from nio_hf.recipe.values import checked, unknown_key
from nio_hf.trainer import NIOTrainingArguments

_DEFAULTS = {"remove_unused_columns": False, "report_to": "none", "enable_jit_checkpoint": True}
"""Defaults of a recipe that differ from TrainingArguments: the image column is read by a transform, trackers are asked
for by name, and SIGTERM saves."""
EMBEDDED = {IMAGE_CLASSIFICATION: "digits", CAUSAL_LM: "stdlib", MASKED_LM: "stdlib"}
"""{task: the data set that needs no download, and is trained on where none is named}."""
_FIXES = {"resume_from_checkpoint": "Give auto, a folder OUTPUT_DIR/checkpoint-N, or null"}
"""What to do about values of the wrong type, where their type says too little."""
_GROUPS = (
    *(ModelSettings, DataSettings, TextSettings, AugmentationSettings, OptimizationSettings),
    NIOTrainingArguments,
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        path: the file that it was read from.
        model: what to train.
        data: what to train on.
        text: how documents become samples, for tasks of text.
        augmentation: what training changes about the images, for tasks of images.
        optimization: what TrainingArguments have no word for.
        training: the rest, NIO included.
        settings: every setting with the place that it comes from, defaults left out.
        task: what the model learns, a key of `METRICS`.
    """

    path: Path
    model: ModelSettings
    data: DataSettings
    text: TextSettings
    augmentation: AugmentationSettings
    optimization: OptimizationSettings
    training: NIOTrainingArguments
    settings: dict[str, Setting]
    task: str

    @property
    def metric(self) -> Metric:
        """What a training of the task is judged by."""
        return METRICS[self.task]

    def replace(self, settings: Mapping[str, Any], where: str = "settings") -> Recipe:
        """This recipe with other values for some settings, checked as a whole.

        Args:
            settings: {key: value} as in a file; `key.part` sets one entry of a mapping.
            where: Name of the place that the values come from, for messages.

        Raises:
            RecipeError: as [`load_recipe`].
        """
        given = {key: Setting(value, f"{where}, {key}") for key, value in settings.items()}
        return _build_recipe(self.path, merge(self.settings, given))

    def __reduce__(self) -> tuple[Any, ...]:
        """What another process builds the recipe from, without its file."""
        return _build_recipe, (self.path, self.settings)


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), *, world_size: int | None = None) -> Recipe:
    """Read and check a recipe; the command line goes before the file, the file before its base and the defaults.

    Args:
        name_or_path: a YAML file, or the name of a recipe that comes with the package.
        overrides: options as `["--learning_rate", "1e-3", "--model_config.hidden_size=192"]`.
        world_size: processes with one device each that will run it, where they are not those of this run.

    Raises:
        RecipeError: lists every unknown key, wrong type, missing setting and setting out of range.
    """
    path = find_recipe(name_or_path)
    return _build_recipe(path, merge(read_layers(path), read_overrides(overrides)), world_size)


def _build_recipe(path: Path, settings: dict[str, Setting], world_size: int | None = None) -> Recipe:
    """The recipe of a file and its settings.

    Raises:
        RecipeError: as [`load_recipe`].
    """
    settings = _with_repository(settings)
    values, problems = _check_types(settings)
    model = ModelSettings(**values[ModelSettings])
    data = DataSettings(**values[DataSettings])
    task = find_task(settings, path)
    data.dataset_name = data.dataset_name or EMBEDDED[task]
    problems += task_problems(task, settings)
    for group in _GROUPS:
        problems += range_problems(values[group], settings)
    problems += model_problems(task, model, settings, path)
    problems += _contradictions(settings, path)
    if problems:
        raise RecipeError(*problems)
    try:
        training = NIOTrainingArguments(**{**_DEFAULTS, **_cpu_default(), **values[NIOTrainingArguments]})
    except ConfigError as error:
        raise RecipeError(*(_relocated(problem, settings, path) for problem in error.problems)) from error
    except (ValueError, TypeError, ImportError, KeyError) as error:
        raise RecipeError(_argument_problem(error, settings, path)) from error
    problems = list(optimizer_problems(training, settings, path))
    if problems:
        raise RecipeError(*problems)
    if world_size is None:
        check_world_size(training.world_size)
    optimization = OptimizationSettings(**values[OptimizationSettings])
    if optimization.global_batch_size is not None:
        at_once = (training.train_batch_size, training.world_size)
        if world_size is not None:
            at_once = (training.per_device_train_batch_size, world_size)
        training.gradient_accumulation_steps = accumulation_steps(settings["global_batch_size"], *at_once)
    augmentation = AugmentationSettings(**values[AugmentationSettings])
    text = TextSettings(**values[TextSettings])
    return Recipe(path, model, data, text, augmentation, optimization, training, settings, task)


def recipe_yaml(recipe: Recipe) -> str:
    """A recipe as it was run, in one file with its base and the overrides.

    The token, and where the run was pushed to and resumed from, are left out.
    """
    private = ("hub_", "push_to_hub", "resume_from_checkpoint")
    settings = {key: setting for key, setting in recipe.settings.items() if not key.startswith(private)}
    return settings_yaml(settings)


def accumulation_steps(global_batch_size: Setting, process_batch_size: int, world_size: int) -> int:
    """Batches that each process adds up for one optimiser step.

    Args:
        global_batch_size: samples of an optimiser step over all processes.
        process_batch_size: samples of a batch of one process.
        world_size: number of processes.

    Raises:
        RecipeError: where the product of the other two does not divide it.
    """
    at_once = process_batch_size * world_size
    if global_batch_size.value % at_once == 0:
        return int(global_batch_size.value // at_once)
    processes = "one process" if world_size == 1 else f"each of {world_size} processes"
    found = f"{global_batch_size.value} is no multiple of {process_batch_size} samples on {processes}"
    share, rest = divmod(global_batch_size.value, world_size)
    sizes = [size for size in range(1, process_batch_size + 1) if share % size == 0]
    fix = f"Set per_device_train_batch_size to {sizes[-1]}, or another divisor of {share}"
    if rest or not sizes:
        fix = f"Choose a global_batch_size that {world_size} processes can share"
    raise RecipeError(Problem(global_batch_size.where, found, fix))


def _with_repository(settings: dict[str, Setting]) -> dict[str, Setting]:
    """Settings in which `push_to_hub: USER/NAME` is what it means."""
    push = settings.get("push_to_hub")
    if push is None or not isinstance(push.value, str):
        return settings
    named = settings.get("hub_model_id", push)
    both_on_the_command_line = named.where.startswith("--") and push.where.startswith("--")
    if named.value != push.value and (both_on_the_command_line or not push.where.startswith("--")):
        found = f"{push.value!r} beside hub_model_id {named.value!r}"
        raise RecipeError(Problem(push.where, found, "Name one repository"))
    return {**settings, "push_to_hub": Setting(True, push.where), "hub_model_id": push}


@functools.cache
def known_keys() -> dict[str, tuple[type, Any]]:
    """{key: (its dataclass, its annotation)} of everything that a recipe can set."""
    keys: dict[str, tuple[type, Any]] = {}
    for group in _GROUPS:
        hints = typing.get_type_hints(group)
        fields = dataclasses.fields(group)
        keys.update({field.name: (group, hints[field.name]) for field in fields if field.init})
    return keys


def _check_types(settings: dict[str, Setting]) -> tuple[dict[type, dict[str, Any]], list[Problem]]:
    known = known_keys()
    values: dict[type, dict[str, Any]] = {group: {} for group in _GROUPS}
    problems = []
    for key, setting in settings.items():
        if key not in known:
            former = replaced_setting(key, "nio_")
            unknown = unknown_key(setting.where, key, known)
            problems.append(unknown if former is None else dataclasses.replace(former, where=setting.where))
            continue
        group, annotation = known[key]
        value, problem = checked(setting, annotation)
        if problem is None:
            values[group][key] = value
        else:
            problems.append(dataclasses.replace(problem, fix=_FIXES.get(key, problem.fix)))
    return values, problems


def _contradictions(settings: dict[str, Setting], path: Path) -> Iterator[Problem]:
    """Settings that are missing or cannot stand together."""

    def given(key: str) -> Any:
        return settings[key].value if key in settings else None

    if "output_dir" not in settings:
        yield Problem(f"{path}, output_dir", "nothing", "Say where to write, e.g. output_dir: outputs/run")
    if given("global_batch_size") is not None and given("auto_find_batch_size") is True:
        fix = "Leave it out: a smaller batch would make smaller steps than global_batch_size says"
        yield Problem(settings["auto_find_batch_size"].where, "given beside global_batch_size", fix)
    for key in {"label_names", "batch_eval_metrics"} & settings.keys():
        yield Problem(settings[key].where, "is decided by the task", "Leave it out")
    if given("remove_unused_columns") is True:
        fix = "Leave it out: it would remove what samples are made of before they are read"
        yield Problem(settings["remove_unused_columns"].where, "true", fix)
    for key in {"optim", "optim_args", "nio_seed_optimizer"} & settings.keys():
        # The settings of AdamW are those of RAdam, which changes the sizes of its steps.
        is_adamw = key == "optim" and str(given(key)).startswith("adamw_torch")
        if given("optimizer") is not None and given(key) is not None and not is_adamw:
            found = f"given beside optimizer: {given('optimizer')}"
            yield Problem(settings[key].where, found, "Leave one of them out")
    if given("global_batch_size") is not None and "gradient_accumulation_steps" in settings:
        fix = "Give one of them: accumulation follows from global_batch_size"
        yield Problem(settings["gradient_accumulation_steps"].where, "given beside global_batch_size", fix)
    yield from _deepspeed_warmup(given("deepspeed"), given("warmup_steps") or 0, settings)
    if given("streaming") is True:
        if not isinstance(given("max_steps"), int) or given("max_steps") < 1:
            fix = "Set max_steps: the length of a stream is not known before it is read"
            yield Problem(settings["streaming"].where, "without max_steps", fix)
        if given("repeated_augmentation") not in (None, 1):
            fix = "Leave one of them out: a stream is drawn in its own order"
            yield Problem(settings["repeated_augmentation"].where, "given with streaming", fix)


def _launched_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _cpu_default() -> dict[str, bool]:
    """Several processes without an accelerator can only mean the CPU, which accelerate does not tell Trainer."""
    return {"use_cpu": True} if _launched_processes() > 1 and not torch.accelerator.is_available() else {}


def check_world_size(world_size: int) -> None:
    """Refuse to train the same model several times over: processes that do not know of each other.

    Raises:
        RecipeError: where more processes were launched than `world_size`, those that take part.
    """
    launched = _launched_processes()
    if launched > 1 and world_size != launched:
        found = f"{launched} processes, of which each would train alone"
        raise RecipeError(Problem("accelerate launch", found, "Give each a device, or set use_cpu: true"))


def _deepspeed_warmup(deepspeed: Any, warmup_steps: Any, settings: dict[str, Setting]) -> Iterator[Problem]:
    """A scheduler of DeepSpeed that warms up where the recipe says that nothing does."""
    if isinstance(deepspeed, str):
        try:
            deepspeed = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            fix = "Give the path of a JSON file, or the settings themselves"
            yield Problem(settings["deepspeed"].where, f"cannot be read: {one_line(error)}", fix)
            return
    scheduler = (deepspeed.get("scheduler") if isinstance(deepspeed, dict) else None) or {}
    steps = (scheduler.get("params") or {}).get("warmup_num_steps", "auto")
    if str(scheduler.get("type", "")).startswith("Warmup") and steps not in (0, "auto") and warmup_steps == 0:
        found = f"its {scheduler['type']} warms up for {steps} steps, but warmup_steps is 0"
        fix = 'Set its warmup_num_steps to "auto", or leave the scheduler to the recipe'
        yield Problem(settings["deepspeed"].where, found, fix)


def _argument_problem(error: Exception, settings: dict[str, Setting], path: Path) -> Problem:
    """The problem behind an error of TrainingArguments, at the first setting that its message names."""
    message = one_line(error)
    places = {key: match.start() for key in settings if (match := re.search(rf"\b{key}\b", message))}
    named = min(places, key=places.__getitem__, default=None)
    where = str(path) if named is None else settings[named].where
    if named in ("bf16", "fp16"):
        # The file of a base is seldom the user's.
        where = where if where.startswith(("--", f"{path},")) else f"{path}, {named}"
        return Problem(where, "this machine has no GPU for it", f"Give --{named} false")
    return Problem(where, message, "Correct that setting")


def _relocated(problem: Problem, settings: dict[str, Setting], path: Path) -> Problem:
    """A problem of a training argument as one of the place that set it."""
    where = settings[problem.where].where if problem.where in settings else f"{path}, {problem.where}"
    return Problem(where, problem.found, problem.fix)
