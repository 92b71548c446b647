"""Check recipes: keys, types, consistency, and with data one batch and one iteration of NIO."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from nio_hf.console import exit_status, print_validation
from nio_hf.errors import NIOError, Problem, RecipeError
from nio_hf.image_training.building import build_trainer, check_buildable
from nio_hf.recipe.consistency import consistency_notes, consistency_problems
from nio_hf.recipe.loading import Recipe, load_recipe
from nio_hf.recipe.strict_yaml import with_values

_TRIAL = {
    "nio_iterations": 1,
    "nio_holdout_batches": 1,
    "nio_save_init": False,
    "report_to": "none",
    "push_to_hub": False,
}


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
        with_data: also load one batch to train on and one to evaluate on, and run one iteration of NIO.
        num_processes: processes to check for; None for those of this run.
    """
    try:
        if not torch.accelerator.is_available():
            # A recipe is checked for the machine that it is meant for: settings that need a GPU are no fault of it.
            overrides = with_values(overrides, {"use_cpu": True})
        recipe = load_recipe(name, overrides, world_size=num_processes)
        world_size = num_processes or recipe.training.world_size
        problems = list(consistency_problems(recipe))
        if problems:
            raise RecipeError(*problems)
        parts = [_described_batch(recipe, world_size)]
        if recipe.model.model_name_or_path is None:
            parts.insert(0, check_buildable(recipe))
        if with_data:
            parts.append(_try_data(name, overrides))
        return Validation(name, "; ".join(parts), tuple(consistency_notes(recipe, world_size)))
    except NIOError as error:
        return Validation(name, error=error)


def _described_batch(recipe: Recipe, world_size: int) -> str:
    """The samples of an optimiser step, as they are shared."""
    processes = f"{world_size} process{'es' if world_size > 1 else ''}"
    size, steps = recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps
    return f"{world_size * size * steps} samples a step: {processes} x {size} x {steps} accumulated"


def _try_data(name: str, overrides: Sequence[str]) -> str:
    """Load a batch of each part and run one iteration of NIO, in a folder that is thrown away; say what happened."""
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = build_trainer(load_recipe(name, with_values(overrides, {**_TRIAL, "output_dir": folder})))
        batch = next(iter(trainer.get_train_dataloader()))
        next(iter(trainer.get_eval_dataloader()))
        after = trainer.run_nio().history[0]
    size = "x".join(map(str, batch["pixel_values"].shape[-2:]))
    parameters = trainer.model.num_parameters()
    return (
        f"{len(batch['labels'])} images of {size} read, {parameters:,} parameters, "
        f"one iteration of NIO at GradCosine {after.grad_cosine:.3f}, gradient norm {after.grad_norm:.3g}"
    )


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
