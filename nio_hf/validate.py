"""Checks of recipes: keys, types and consistency, and on request one batch of data and a short run of NIO."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.markup import escape

from nio_hf.console import FAILURE, exit_status, print_error
from nio_hf.durable.manifest import check_checkpoint
from nio_hf.durable.trainer import AUTO
from nio_hf.errors import NIOError, Problem, RecipeError
from nio_hf.files import ensure_writable
from nio_hf.recipe.loading import Recipe, load_recipe
from nio_hf.tasks import build_trainer, task_of
from nio_hf.tasks.optimizers import decayed_parameters
from nio_hf.trainer.early_checks import check_best_metric
from nio_hf.trainer.methods import METHODS
from nio_hf.trainer.seeding import check_seedable

NIO, WARMUP, NO_WARMUP = "nio", "warmup", "no_warmup"
"""Variants of recipes, whose names state settings."""


@dataclasses.dataclass(frozen=True)
class Validation:
    """Findings about a recipe.

    Attributes:
        summary: Model and batches of the recipe, in words.
        notes: Settings that work but may be a mistake, in words.
        error: Error of the recipe; None for a valid one.
    """

    summary: str = ""
    notes: tuple[str, ...] = ()
    error: NIOError | None = None


def validate_recipe(
    name: str, overrides: Sequence[str] = (), *, with_data: bool = False, num_processes: int | None = None
) -> Validation:
    """Check a recipe without training it.

    Args:
        name: Path of a YAML file, or name of a recipe that comes with the package.
        overrides: Overrides, as in [`load_recipe`].
        with_data: Whether to load a batch of each split, and run NIO with as few iterations as it can.
        num_processes: Number of processes that the recipe is checked for; None for the number of this run.
    """
    # A recipe may be meant for another machine: settings that need a GPU are valid here.
    decided = {} if with_data or torch.accelerator.is_available() else {"use_cpu": True}
    try:
        recipe = load_recipe(name, overrides, decided=decided, world_size=num_processes)
        problems = list(consistency_problems(recipe))
        if problems:
            raise RecipeError(*problems)
        world_size = num_processes or recipe.training.world_size
        parts = [] if recipe.model.model_name_or_path is not None else [_build_model(recipe)]
        size, steps = recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps
        processes = f"{world_size} process{'es' if world_size > 1 else ''} x {size} x {steps} accumulated"
        parts.append(f"{world_size * size * steps} samples a step: {processes}")
        if with_data:
            parts.append(_try_data(load_recipe(name, overrides)))
        return Validation("; ".join(parts), tuple(consistency_notes(recipe, world_size)))
    except NIOError as error:
        return Validation(error=error)


def consistency_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield the settings that contradict the name of the recipe."""
    variant, training = recipe.path.stem, recipe.training
    if variant not in (NIO, WARMUP, NO_WARMUP):
        return
    if variant != WARMUP and training.warmup_steps > 0:
        found = f"{training.warmup_steps:g} in a recipe without warmup"
        yield Problem(recipe.place("warmup_steps"), found, "Set warmup_steps: 0")
    if variant == WARMUP and training.warmup_steps == 0:
        yield Problem(recipe.place("warmup_steps"), "0 in a recipe with warmup", "Set the number of warmup steps")
    if training.nio != (variant == NIO):
        found, fix = f"{str(training.nio).lower()} in {recipe.path.name}", f"Set nio: {str(variant == NIO).lower()}"
        yield Problem(recipe.place("nio"), found, fix)


def consistency_notes(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Yield the settings that work but may be a mistake, in words."""
    training = recipe.training
    if training.nio and training.nio_sub_batches % world_size:
        idle = world_size - training.nio_sub_batches
        consequence = f"{idle} of them are idle" if idle > 0 else "some of them wait while others compute"
        yield f"{training.nio_sub_batches} sub-batches on {world_size} processes: {consequence}"


def _build_model(recipe: Recipe) -> str:
    """Build the model of a recipe without memory for its weights, and return the name of its class.

    Raises:
        ModelError: A model that cannot be built, or lacks a parameter that `no_weight_decay` names.
    """
    task = task_of(recipe)
    with torch.device("meta"):
        model = task.build_model(recipe)
    if recipe.optimization.no_weight_decay is not None:
        decayed_parameters(model, recipe.optimization.no_weight_decay)
    task.check_model(recipe, model)
    return type(model).__name__


def _try_data(recipe: Recipe) -> str:
    """Load a batch of each split, run NIO shortly in a temporary folder, and return the findings in words.

    Raises:
        NIOError: Everything that a training would refuse before its start: an output directory that cannot be written,
            a checkpoint that cannot be resumed from, and the errors of [`build_trainer`] and NIO.
    """
    output_dir, checkpoint = Path(cast(str, recipe.training.output_dir)), recipe.training.resume_from_checkpoint
    ensure_writable(next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists()))
    if checkpoint not in (None, AUTO):
        check_checkpoint(Path(checkpoint), verify=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(recipe.replace({"output_dir": folder}))
        args, model = trainer.args, cast(Any, trainer.model)
        check_best_metric(trainer)
        if args.nio_seed_optimizer is not None:
            check_seedable(trainer)
        found = f"{task_of(recipe).describe_batch(trainer)}, {model.num_parameters():,} parameters"
        if not args.nio:
            return found
        # The data has to suffice for the run of the recipe, not only for this short one.
        trainer.get_nio_dataloader()
        vars(args).update(nio_report_batches=1, nio_iterations=1, nio_save_init=False)
        if "iterations" in METHODS[args.nio_method].options:
            args.nio_method_kwargs = {**args.nio_method_options, "iterations": 1}
        result = trainer.run_nio()
    values = f"GradCosine {result.before.value:.3f} -> {result.after.value:.3f}"
    return f"{found}; a short run of {result.title}: {values}"


def run_validation(arguments: Sequence[str], *, with_data: bool, num_processes: int | None) -> int:
    """Validate the recipes that stand first on a command line with the overrides behind them.

    Each result is printed at once. The return value is the exit status.
    """
    names = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    overrides, console = arguments[len(names) :], Console()

    def command() -> int:
        if not names:
            raise RecipeError(Problem("nio-hf validate", "no recipe", "Name one, or the path of a YAML file"))
        failures = 0
        for name in names:
            found = validate_recipe(name, overrides, with_data=with_data, num_processes=num_processes)
            if found.error is None:
                console.print(
                    f"[green]ok[/green]  {escape(name)}  [dim]{escape(found.summary)}[/dim]",
                    highlight=False,
                    soft_wrap=True,
                )
            else:
                failures += 1
                console.print(f"[red]no[/red]  {escape(name)}", highlight=False, soft_wrap=True)
                print_error(found.error, console)
            for note in found.notes:
                console.print(f"    Note: {escape(note)}.", style="yellow", highlight=False, soft_wrap=True)
        return FAILURE if failures else 0

    return exit_status(command)
