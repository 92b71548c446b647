"""The command line of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from nio_hf.comparison.arms import choose_arms
from nio_hf.comparison.comparing import Comparison, compare
from nio_hf.comparison.plan import CONTROLLED, Plan
from nio_hf.comparison.report import VERDICT_COLUMNS, grid_columns, grid_rows, sentences, verdict_rows
from nio_hf.console import exit_status, print_comparison
from nio_hf.errors import NIOError, Problem, RecipeError
from nio_hf.recipe.catalog import split_arguments
from nio_hf.recipe.loading import Recipe, load_recipe
from nio_hf.recipe.strict_yaml import read_overrides

RATE_FACTORS = (0.5, 1.0, 2.0, 4.0)
"""The learning rates of the grid where none are given, as multiples of the recipe's."""
_GO_ON = "The runs that have ended are kept: the same command goes on."


def run_comparison(
    arguments: Sequence[str],
    *,
    arms: str,
    definitions: Sequence[str],
    learning_rates: str | None,
    warmup_ratios: str,
    seeds: int,
    verdict_seeds: int,
    steps: int | None,
    jobs: int,
    diagnostics: bool,
    output_dir: Path | None,
) -> int:
    """Compare as a command line says, and print what follows; returns the exit status."""

    def command() -> int:
        name, overrides = split_arguments(arguments)
        _check_overrides(overrides)
        recipe = load_recipe(name, overrides)
        problems: list[Problem] = []
        rates = _numbers("--learning_rates", learning_rates, problems) or _default_rates(recipe, learning_rates)
        ratios = _numbers("--warmup_ratios", warmup_ratios, problems)
        budget = recipe.training.max_steps if steps is None else steps
        if budget < 1 and steps is None:
            problems.append(Problem("--steps", "nothing, and the recipe counts in epochs", "Give the steps of a run"))
        try:
            chosen = choose_arms([arm for arm in arms.split(",") if arm], definitions)
            plan = Plan(chosen, tuple(sorted(rates)), tuple(sorted(ratios)), seeds, verdict_seeds, max(budget, 1))
        except RecipeError as error:
            problems += error.problems
        if problems:
            raise RecipeError(*problems)
        comparison = Comparison(
            recipe=name,
            overrides=tuple(overrides),
            plan=plan,
            directory=output_dir or _default_directory(recipe),
            jobs=jobs,
            diagnostics=diagnostics,
        )
        _check_arms(comparison)
        findings, written = compare(comparison)
        tables = {"Accuracy (%) by learning rate": (grid_columns(plan), grid_rows(findings))}
        if findings.verdicts:
            tables["On fresh seeds"] = (VERDICT_COLUMNS, verdict_rows(findings))
        print_comparison(findings.title, tables, sentences(findings), written)
        return 0

    return exit_status(command, interrupted=_GO_ON)


def _check_overrides(overrides: Sequence[str]) -> None:
    """Refuse settings that a comparison decides itself.

    Raises:
        RecipeError: lists all of them, with the option that decides each.
    """
    problems = [
        Problem(setting.where, "is decided by the comparison", f"Use {CONTROLLED[key]}")
        for key, setting in read_overrides(overrides).items()
        if key in CONTROLLED
    ]
    if problems:
        raise RecipeError(*problems)


def _check_arms(comparison: Comparison) -> None:
    """Find out before the first run whether the recipe of every arm can be read.

    Raises:
        RecipeError: with what is wrong, and the arm.
    """
    runs = {run.arm: run for run in reversed(comparison.plan.grid())}
    for arm, run in runs.items():
        order = comparison.order_for(run)
        try:
            load_recipe(order.recipe, order.overrides)
        except NIOError as error:
            raise RecipeError(*(Problem(f"arm {arm}, {p.where}", p.found, p.fix) for p in error.problems)) from error


def _numbers(option: str, text: str | None, problems: list[Problem]) -> list[float]:
    """The numbers between commas."""
    numbers = []
    for part in (text or "").split(","):
        try:
            if part.strip():
                numbers.append(float(part))
        except ValueError:
            problems.append(Problem(option, f"{part!r} is no number", "Give numbers between commas, e.g. 5e-4,1e-3"))
    return numbers


def _default_rates(recipe: Recipe, given: str | None) -> list[float]:
    """The learning rates around that of a recipe, where none are given."""
    if given is not None:
        return []
    return [float(f"{factor * recipe.training.learning_rate:.6g}") for factor in RATE_FACTORS]


def _default_directory(recipe: Recipe) -> Path:
    """Where a comparison of a recipe is written."""
    output_dir = Path(cast(str, recipe.training.output_dir))
    return output_dir.with_name(f"{output_dir.name}-compare")
