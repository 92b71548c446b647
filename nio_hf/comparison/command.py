"""The command line of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nio_hf.catalog import split_arguments
from nio_hf.comparison.arms import ARMS, CONTROLLED, choose_arms
from nio_hf.comparison.comparing import compare
from nio_hf.comparison.plan import Plan
from nio_hf.comparison.report import EVALUATED, grid_columns, grid_rows, sentences, verdict_columns, verdict_rows
from nio_hf.console import exit_status, print_results
from nio_hf.errors import Problem, RecipeError
from nio_hf.recipe.loading import Recipe, load_recipe
from nio_hf.trials.bench import Bench
from nio_hf.trials.options import (
    GO_ON,
    check_overrides,
    cleaned_up_at_sigterm,
    directory_beside,
    merge_problems,
    read_numbers,
    steps_of,
)

RATE_FACTORS = (0.5, 1.0, 2.0, 4.0)
"""The learning rates of the grid where none are given, as multiples of the recipe's."""


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
    budget: int | None,
    jobs: int,
    diagnostics: bool,
    output_dir: Path | None,
) -> int:
    """Compare as a command line says, and print what follows; returns the exit status."""

    def command() -> int:
        name, overrides = split_arguments(arguments)
        check_overrides(overrides, CONTROLLED)
        recipe = load_recipe(name, overrides)
        problems: list[Problem] = []
        given = read_numbers("--learning_rates", learning_rates, problems, "5e-4,1e-3")
        rates = given if learning_rates is not None else _default_rates(recipe)
        ratios = read_numbers("--warmup_ratios", warmup_ratios, problems, "0.05,0.1")
        length = steps_of(recipe, steps, problems)
        chosen = tuple(ARMS.values())
        try:
            chosen = choose_arms([arm for arm in arms.split(",") if arm], definitions)
        except RecipeError as error:
            problems = merge_problems(problems, error.problems)
        try:
            plan = Plan(chosen, tuple(sorted(rates)), tuple(sorted(ratios)), seeds, verdict_seeds, length, budget)
        except RecipeError as error:
            problems = merge_problems(problems, error.problems)
        if problems:
            raise RecipeError(*problems)
        directory = output_dir or directory_beside(recipe, "compare")
        bench = Bench(name, tuple(overrides), directory, jobs, diagnostics)
        bench.check(plan.trials(plan.grid()))
        with cleaned_up_at_sigterm():
            findings, written = compare(bench, plan)
        tables = {f"{findings.metric.heading} by learning rate": (grid_columns(plan), grid_rows(findings))}
        if findings.verdicts:
            title = f"On {plan.verdict_seeds} fresh seeds and {EVALUATED[findings.evaluated is not None]}"
            tables[title] = (verdict_columns(findings.metric), verdict_rows(findings))
        print_results(findings.title, tables, sentences(findings), written)
        return 0

    return exit_status(command, interrupted=GO_ON)


def _default_rates(recipe: Recipe) -> list[float]:
    """The learning rates around that of a recipe."""
    return [float(f"{factor * recipe.training.learning_rate:.6g}") for factor in RATE_FACTORS]
