"""The command line of a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nio_hf.catalog import split_arguments
from nio_hf.console import exit_status, print_results
from nio_hf.errors import Problem, RecipeError
from nio_hf.recipe.loading import load_recipe
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
from nio_hf.tuning.plan import DECIDED, Plan
from nio_hf.tuning.report import COLUMNS, rows, sentences, write_report
from nio_hf.tuning.tuning import tune

SHOWN = 5
"""Columns of the table that a terminal has room for."""


def run_tuning(
    arguments: Sequence[str],
    *,
    groups: str,
    strengths: str,
    seeds: int,
    verdict_seeds: int,
    probe_steps: int,
    steps: int | None,
    budget: int | None,
    jobs: int,
    output_dir: Path | None,
) -> int:
    """Search as a command line says, and print what follows; returns the exit status."""

    def command() -> int:
        name, overrides = split_arguments(arguments)
        check_overrides(overrides, DECIDED)
        recipe = load_recipe(name, overrides)
        problems: list[Problem] = []
        numbers = tuple(sorted(read_numbers("--strengths", strengths, problems, "0.5,1")))
        length = steps_of(recipe, steps, problems)
        try:
            plan = Plan(
                groups=_words(groups),
                strengths=numbers,
                learning_rate=recipe.training.learning_rate,
                seeds=seeds,
                probe_steps=probe_steps,
                steps=probe_steps if problems else length,
                verdict_seeds=verdict_seeds,
                budget=budget,
            )
        except RecipeError as error:
            problems = merge_problems(problems, error.problems)
        if problems:
            raise RecipeError(*problems)
        bench = Bench(name, tuple(overrides), output_dir or directory_beside(recipe, "tune"), jobs)
        bench.check(plan.probes(plan.candidates(recipe), 0))
        with cleaned_up_at_sigterm():
            tuned = tune(bench, plan)
        written = write_report(tuned, bench.directory)
        title = f"Probes of {plan.probe_steps} steps at learning rate {plan.learning_rate:g}"
        shown = [row[:SHOWN] for row in rows(tuned)]
        print_results(tuned.title, {title: (COLUMNS[:SHOWN], shown)}, sentences(tuned), written)
        return 0

    return exit_status(command, interrupted=GO_ON)


def _words(text: str) -> tuple[str, ...]:
    """The words that a command line lists."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
