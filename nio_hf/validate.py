"""Check recipes: keys, types, consistency, and with data one batch and a short run of NIO."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from nio_hf.console import exit_status, print_validation
from nio_hf.durable.manifest import check_checkpoint
from nio_hf.durable.trainer import AUTO
from nio_hf.errors import NIOError, Problem, RecipeError
from nio_hf.files import ensure_writable
from nio_hf.recipe.consistency import consistency_notes, consistency_problems
from nio_hf.recipe.loading import Recipe, load_recipe
from nio_hf.recipe.strict_yaml import with_values
from nio_hf.tasks import build_trainer, task_of
from nio_hf.tasks.optimizers import decayed_parameters
from nio_hf.tasks.trainer import RecipeTrainer
from nio_hf.trainer import NIOTrainingArguments
from nio_hf.trainer.early_checks import check_best_metric
from nio_hf.trainer.methods import METHODS
from nio_hf.trainer.seeding import check_seedable

_SHORTEST = {
    "nio_search_batches": 2,
    "nio_report_batches": 1,
    "nio_budget": 1.0,
    "nio_iterations": 1,
    "nio_save_init": False,
}
"""Settings of the cheapest run of NIO."""


@dataclasses.dataclass(frozen=True)
class Validation:
    """What was found about a recipe.

    Attributes:
        name: as it was given.
        summary: what the recipe comes to.
        notes: what works but may not be meant.
        error: what is wrong with it; None where nothing is.
    """

    name: str
    summary: str = ""
    notes: tuple[str, ...] = ()
    error: NIOError | None = None


def validate_recipe(
    name: str, overrides: Sequence[str] = (), *, with_data: bool = False, num_processes: int | None = None
) -> Validation:
    """Check a recipe without training it.

    Args:
        name: a YAML file or the name of a recipe that comes with the package.
        overrides: options as of [`load_recipe`].
        with_data: also load one batch to train on and one to evaluate on, and run NIO as shortly as it can.
        num_processes: processes to check for; None for those of this run.
    """
    try:
        if not with_data and not torch.accelerator.is_available():
            # A recipe is checked for the machine that it is meant for: settings that need a GPU are no fault of it.
            overrides = with_values(overrides, {"use_cpu": True})
        recipe = load_recipe(name, overrides, world_size=num_processes)
        world_size = num_processes or recipe.training.world_size
        problems = list(consistency_problems(recipe))
        if problems:
            raise RecipeError(*problems)
        parts = [_described_batch(recipe, world_size)]
        if recipe.model.model_name_or_path is None:
            parts.insert(0, _built(recipe))
        if with_data:
            parts.append(_try_data(name, overrides))
        return Validation(name, "; ".join(parts), tuple(consistency_notes(recipe, world_size)))
    except NIOError as error:
        return Validation(name, error=error)


def _built(recipe: Recipe) -> str:
    """Build the model of a recipe without memory for weights, and return its name.

    Raises:
        ModelError: for a model that cannot be built, or lacks a parameter that is named in `no_weight_decay`.
    """
    task = task_of(recipe)
    with torch.device("meta"):
        model = task.build_model(recipe)
    if recipe.optimization.no_weight_decay is not None:
        decayed_parameters(model, recipe.optimization.no_weight_decay)
    task.check_model(recipe, model)
    return type(model).__name__


def _described_batch(recipe: Recipe, world_size: int) -> str:
    """The samples of an optimiser step, as they are shared."""
    processes = f"{world_size} process{'es' if world_size > 1 else ''}"
    size, steps = recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps
    return f"{world_size * size * steps} samples a step: {processes} x {size} x {steps} accumulated"


def _try_data(name: str, overrides: Sequence[str]) -> str:
    """Load a batch of each split and run NIO shortly, in a folder that is thrown away; say what happened."""
    _check_folders(load_recipe(name, overrides).training)
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(name, with_values(overrides, {"output_dir": folder}))
        trainer = build_trainer(recipe)
        check_best_metric(trainer)
        if trainer.args.nio_seed_optimizer is not None:
            check_seedable(trainer)
        model: Any = trainer.model
        found = [f"{task_of(recipe).describe_batch(trainer)}, {model.num_parameters():,} parameters"]
        if trainer.args.nio:
            found.append(_try_nio(trainer))
    return "; ".join(found)


def _check_folders(args: NIOTrainingArguments) -> None:
    """Refuse an output that cannot be written, and a checkpoint that cannot be resumed from, without making either."""
    output_dir = Path(cast(str, args.output_dir))
    ensure_writable(next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists()))
    if args.resume_from_checkpoint not in (None, AUTO):
        check_checkpoint(Path(args.resume_from_checkpoint), verify=True)


def _try_nio(trainer: RecipeTrainer) -> str:
    """Check that there is data for the run of NIO that the recipe asks for, do the shortest one; say what it did."""
    args = trainer.args
    trainer.get_nio_dataloader()
    vars(args).update(_SHORTEST)
    if "iterations" in METHODS[args.nio_method].options:
        args.nio_method_kwargs = {**args.nio_method_options, "iterations": 1}
    result = trainer.run_nio()
    return f"a short run of {result.title}: GradCosine {result.before.value:.3f} -> {result.after.value:.3f}"


def run_validation(arguments: Sequence[str], *, with_data: bool, num_processes: int | None) -> int:
    """Validate the recipes that stand first on a command line with the overrides behind them; returns the status."""
    names = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    overrides = arguments[len(names) :]

    def command() -> int:
        if not names:
            raise RecipeError(Problem("nio-hf validate", "no recipe", "Name one, or the path of a YAML file"))
        found = (validate_recipe(name, overrides, with_data=with_data, num_processes=num_processes) for name in names)
        return print_validation((v.name, v.summary, v.notes, v.error) for v in found)

    return exit_status(command)
