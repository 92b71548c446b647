"""The command line of a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nio_hf.console import exit_status, print_comparison
from nio_hf.errors import Problem, RecipeError
from nio_hf.recipe.catalog import split_arguments
from nio_hf.recipe.loading import load_recipe
from nio_hf.trials.bench import Bench
from nio_hf.trials.options import GO_ON, check_overrides, directory_beside, numbers, settled, steps_of
from nio_hf.trials.run import written
from nio_hf.tuning.plan import DECIDED, Plan
from nio_hf.tuning.report import COLUMNS, rows, sentences, write_report
from nio_hf.tuning.tuning import tune

SHOWN = 5
"""Columns of the table that a terminal has room for."""
NO_BOUND = written(None)
"""How a command line names the absence of a bound."""


def run_tuning(
    arguments: Sequence[str],
    *,
    gammas: str,
    loss_rises: str,
    rates: str,
    iterations: str,
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
        tried_gammas = _bounds("--gammas", gammas, problems, "1.5,none")
        tried_rises = _bounds("--loss_rises", loss_rises, problems, "0.1,none")
        tried_rates = numbers("--rates", rates, problems, float, "0.1,0.3")
        tried_iterations = numbers("--iterations", iterations, problems, int, "5,10")
        length = steps_of(recipe, steps, problems)
        try:
            plan = Plan(
                gammas=tried_gammas,
                loss_rises=tried_rises,
                rates=tuple(sorted(tried_rates)),
                iterations=tuple(sorted(tried_iterations)),
                learning_rate=recipe.training.learning_rate,
                seeds=seeds,
                probe_steps=probe_steps,
                steps=probe_steps if problems else length,
                verdict_seeds=verdict_seeds,
                budget=budget,
            )
        except RecipeError as error:
            problems = settled(problems, error.problems)
        if problems:
            raise RecipeError(*problems)
        bench = Bench(name, tuple(overrides), output_dir or directory_beside(recipe, "tune"), jobs)
        bench.check(plan.probes(plan.candidates(recipe), 0))
        tuned = tune(bench, plan)
        written = write_report(tuned, bench.directory)
        title = f"Probes of {plan.probe_steps} steps at learning rate {plan.learning_rate:g}"
        shown = [row[:SHOWN] for row in rows(tuned)]
        print_comparison(tuned.title, {title: (COLUMNS[:SHOWN], shown)}, sentences(tuned), written)
        return 0

    return exit_status(command, interrupted=GO_ON)


def _bounds(option: str, text: str, problems: list[Problem], example: str) -> tuple[float | None, ...]:
    """Bounds that a command line lists, the tightest first, no bound last."""
    parts = [part.strip() for part in text.split(",")]
    bounded = numbers(option, ",".join(part for part in parts if part != NO_BOUND), problems, float, example)
    return (*sorted(bounded), *(None for part in parts if part == NO_BOUND))
