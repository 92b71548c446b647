"""Whether a recipe that can be loaded is what it claims to be, and fits the processes that run it."""

from __future__ import annotations

from collections.abc import Iterator

from nio_hf.errors import Problem
from nio_hf.recipe.loading import Recipe

NIO, WARMUP, NO_WARMUP = "nio", "warmup", "no_warmup"
"""Variants that say by their name what they are."""


def consistency_problems(recipe: Recipe) -> Iterator[Problem]:
    """What contradicts the name of the recipe."""
    variant, training = recipe.path.stem, recipe.training
    if variant in (NIO, NO_WARMUP) and training.warmup_steps > 0:
        found = f"{training.warmup_steps:g} in a recipe without warmup"
        yield Problem(_where(recipe, "warmup_steps"), found, "Set warmup_steps: 0")
    if variant == WARMUP and training.warmup_steps == 0:
        yield Problem(
            _where(recipe, "warmup_steps"), "0 in a recipe with warmup", "Say how many steps of warmup it has"
        )
    if variant in (NIO, NO_WARMUP, WARMUP) and training.nio != (variant == NIO):
        fix = f"Set nio: {str(variant == NIO).lower()}"
        yield Problem(_where(recipe, "nio"), f"{str(training.nio).lower()} in {recipe.path.name}", fix)


def consistency_notes(recipe: Recipe, world_size: int) -> Iterator[str]:
    """What works but may not be meant."""
    training = recipe.training
    if training.nio and training.warmup_steps > 0 and recipe.path.stem not in (NIO, NO_WARMUP):
        yield "NIO and warmup are both on: their effects cannot be told apart"
    if training.nio and training.nio_sub_batches % world_size:
        busy = min(training.nio_sub_batches, world_size)
        idle = (
            "some of them wait while others compute" if busy == world_size else f"{world_size - busy} of them are idle"
        )
        yield f"{training.nio_sub_batches} sub-batches on {world_size} processes: {idle}"


def _where(recipe: Recipe, key: str) -> str:
    return recipe.settings[key].where if key in recipe.settings else f"{recipe.path}, {key}"
