"""From a YAML file and the command line to a checked recipe, with every problem reported at once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nio_hf.catalog import find_recipe, flat_recipe_name
from nio_hf.core.config import replaced_setting
from nio_hf.errors import ConfigError, Problem, RecipeError
from nio_hf.metrics import CAUSAL_LM, IMAGE_CLASSIFICATION, MASKED_LM, METRICS, Metric
from nio_hf.recipe.checks import argument_problem, find_task, model_problems, optimizer_problems, setting_problems
from nio_hf.recipe.keys import GROUPS, check_value, known_keys, unknown_key
from nio_hf.recipe.layering import merge, read_layers, settings_yaml
from nio_hf.recipe.settings import AugmentationSettings, DataSettings, ModelSettings, OptimizationSettings, TextSettings
from nio_hf.recipe.strict_yaml import Setting, Settings, read_overrides
from nio_hf.trainer import NIOTrainingArguments

_DEFAULTS = {"remove_unused_columns": False, "report_to": "none", "enable_jit_checkpoint": True}
"""Defaults of a recipe that differ from those of TrainingArguments: a transform reads the image column, trackers are
asked for by name, and SIGTERM saves a checkpoint."""
_EMBEDDED = {IMAGE_CLASSIFICATION: "digits", CAUSAL_LM: "stdlib", MASKED_LM: "stdlib"}
"""{task: default data set, which needs no download}."""
_FIXES = {"resume_from_checkpoint": "Give auto, a folder OUTPUT_DIR/checkpoint-N, or null"}
"""{key: advice about values of a wrong type}, for keys whose type says too little."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe. It can be pickled: another process builds it again without its file.

    Attributes:
        path: File of the recipe.
        model: Settings of the model.
        data: Settings of the data set.
        text: Settings by which documents become samples, for tasks of text.
        augmentation: Settings by which training changes images, for tasks of images.
        optimization: Settings of the optimisation that TrainingArguments lack.
        training: Training arguments, NIO included.
        settings: Every given setting with its place.
        task: Task that the model learns, a key of `METRICS`.
    """

    path: Path
    model: ModelSettings
    data: DataSettings
    text: TextSettings
    augmentation: AugmentationSettings
    optimization: OptimizationSettings
    training: NIOTrainingArguments
    settings: Settings
    task: str

    @property
    def metric(self) -> Metric:
        """Metric by which trainings of the task are judged."""
        return METRICS[self.task]

    def replace(self, settings: Mapping[str, Any], where: str = "settings") -> Recipe:
        """Return this recipe with other values for some settings, checked as a whole.

        Args:
            settings: {key: value} as in a file; `key.part` sets one entry of a mapping.
            where: Source of the values, for messages.

        Raises:
            RecipeError: Problems as in [`load_recipe`].
        """
        given = {key: Setting(value, f"{where}, {key}") for key, value in settings.items()}
        return build_recipe(self.path, merge(self.settings, given))

    def place(self, key: str) -> str:
        """Place of a setting; the file and the key for a default."""
        return self.settings.place(key)

    def __reduce__(self) -> tuple[Any, ...]:
        return build_recipe, (self.path, self.settings)


def load_recipe(
    name_or_path: str,
    overrides: Sequence[str] = (),
    *,
    decided: Mapping[str, Any] | None = None,
    world_size: int | None = None,
) -> Recipe:
    """Read and check a recipe. The command line overrides the file, the file its base, and the base the defaults.

    Args:
        name_or_path: YAML file, or name of a recipe that comes with the package.
        overrides: Options as `["--learning_rate", "1e-3", "--model_config.hidden_size=192"]`.
        decided: {key: value} of settings that override the options.
        world_size: Number of processes with one device each that will run the recipe; None for those of this run.

    Raises:
        RecipeError: Every unknown key, wrong type, missing setting and setting out of range.
    """
    path = find_recipe(name_or_path)
    return build_recipe(path, merge(read_layers(path), read_overrides(overrides, decided)), world_size)


def build_recipe(path: Path, given: Mapping[str, Setting], world_size: int | None = None) -> Recipe:
    """Build and check the recipe of a file from its settings.

    Raises:
        RecipeError: Problems as in [`load_recipe`].
    """
    settings = _with_repository(Settings(path, given))
    settings.setdefault("output_dir", Setting(f"outputs/{flat_recipe_name(path)}", settings.place("output_dir")))
    values, problems = _check_types(settings)
    model, data = ModelSettings(**values[ModelSettings]), DataSettings(**values[DataSettings])
    task = find_task(settings)
    data.dataset_name = data.dataset_name or _EMBEDDED[task]
    problems += [*model_problems(task, model, settings), *setting_problems(task, settings)]
    if problems:
        raise RecipeError(*problems)
    # Several processes without an accelerator train on the CPU, which accelerate does not tell Trainer.
    on_cpu = {"use_cpu": True} if _launched_processes() > 1 and not torch.accelerator.is_available() else {}
    try:
        training = NIOTrainingArguments(**{**_DEFAULTS, **on_cpu, **values[NIOTrainingArguments]})
    except ConfigError as error:
        places = (dataclasses.replace(problem, where=settings.place(problem.where)) for problem in error.problems)
        raise RecipeError(*places) from error
    except (ValueError, TypeError, ImportError, KeyError, OSError) as error:
        raise RecipeError(argument_problem(error, settings)) from error
    problems = list(optimizer_problems(training, settings))
    if problems:
        raise RecipeError(*problems)
    if world_size is None:
        check_world_size(training.world_size)
    text, augmentation = TextSettings(**values[TextSettings]), AugmentationSettings(**values[AugmentationSettings])
    optimization = OptimizationSettings(**values[OptimizationSettings])
    if optimization.global_batch_size is not None:
        at_once = (training.train_batch_size, training.world_size)
        if world_size is not None:
            at_once = (training.per_device_train_batch_size, world_size)
        training.gradient_accumulation_steps = accumulation_steps(settings["global_batch_size"], *at_once)
    return Recipe(path, model, data, text, augmentation, optimization, training, settings, task)


def recipe_yaml(recipe: Recipe) -> str:
    """A recipe as one YAML text, with its base and the overrides.

    It lacks the token, the repository, and the checkpoint that the run resumed from.
    """
    private = ("hub_", "push_to_hub", "resume_from_checkpoint")
    settings = {key: setting for key, setting in recipe.settings.items() if not key.startswith(private)}
    return settings_yaml(settings)


def accumulation_steps(global_batch_size: Setting, process_batch_size: int, world_size: int) -> int:
    """Number of batches of `process_batch_size` samples that each process accumulates for one optimiser step.

    Raises:
        RecipeError: Global batch size that is no multiple of the product of the other two.
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


def check_world_size(world_size: int) -> None:
    """Refuse processes that do not know of each other: each would train the same model.

    Raises:
        RecipeError: Launched processes of another number than `world_size`, the number that take part.
    """
    launched = _launched_processes()
    if launched > 1 and world_size != launched:
        found = f"{launched} processes, of which each would train alone"
        raise RecipeError(Problem("accelerate launch", found, "Give each a device, or set use_cpu: true"))


def _launched_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _with_repository(settings: Settings) -> Settings:
    """Replace `push_to_hub: USER/NAME` by `push_to_hub: true` and `hub_model_id: USER/NAME`."""
    push = settings.get("push_to_hub")
    if push is None or not isinstance(push.value, str):
        return settings
    named = settings.get("hub_model_id", push)
    both_on_the_command_line = named.where.startswith("--") and push.where.startswith("--")
    if named.value != push.value and (both_on_the_command_line or not push.where.startswith("--")):
        found = f"{push.value!r} beside hub_model_id {named.value!r}"
        raise RecipeError(Problem(push.where, found, "Name one repository"))
    return Settings(settings.path, {**settings, "push_to_hub": Setting(True, push.where), "hub_model_id": push})


def _check_types(settings: Settings) -> tuple[dict[type, dict[str, Any]], list[Problem]]:
    """Return ({class: {field: value}}, problems of the values that do not fit)."""
    values: dict[type, dict[str, Any]] = {group: {} for group in GROUPS}
    problems = []
    for key, setting in settings.items():
        if key not in known_keys():
            former = replaced_setting(key, "nio_")
            unknown = unknown_key(setting.where, key, known_keys())
            problems.append(unknown if former is None else dataclasses.replace(former, where=setting.where))
            continue
        group, annotation = known_keys()[key]
        value, problem = check_value(setting, annotation)
        if problem is None:
            values[group][key] = value
        else:
            problems.append(dataclasses.replace(problem, fix=_FIXES.get(key, problem.fix)))
    return values, problems
