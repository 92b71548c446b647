"""Carry out a comparison: the runs that are missing, then what follows from all of them."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from nio_hf.comparison.analysis import cells, choose, largest_gain, warmup_gains
from nio_hf.comparison.arms import CONTROLLED
from nio_hf.comparison.findings import Findings
from nio_hf.comparison.plan import Plan
from nio_hf.comparison.report import write_report
from nio_hf.errors import Problem
from nio_hf.image_training.building import load_data
from nio_hf.recipe.catalog import recipe_name
from nio_hf.trials.bench import Bench, Trials
from nio_hf.trials.progress import Progress
from nio_hf.trials.schedule import RunError


def compare(bench: Bench, plan: Plan) -> tuple[Findings, dict[str, Path]]:
    """Carry out the runs that are missing, and write what follows from all of them.

    Returns:
        The findings, and {what: file} of what was written.

    Raises:
        RecipeError: for results of another comparison in the directory, or another process at work in it.
        RunError: for a run that ended without an outcome, and a grid of which every run failed.
    """
    recipe = bench.load()
    data = load_data(recipe)
    title, chance = recipe_name(recipe.path), 100 / len(data.class_names)
    with Trials(bench, recipe, CONTROLLED, steps=plan.steps) as trials:
        with Progress("Comparing", plan.least_runs(), lambda: _table(plan, trials)) as progress:
            trials.complete(plan.trials(plan.grid()), progress)
            if all(outcome.error is not None for outcome in trials.outcomes.values()):
                fix = f"Lower --learning_rates, with another --output_dir; the logs lie in {bench.directory / 'runs'}"
                raise RunError(Problem("runs", "every one failed", fix))
            if plan.verdict_seeds:
                found = cells(plan, trials.outcomes, chance)
                runs = plan.verdict_runs(choose(found))
                most = largest_gain(warmup_gains(found))
                if most is not None:
                    runs += plan.gain_runs(most.learning_rate, most.warmup_ratio)
                fresh = dict.fromkeys(runs)
                progress.expect(len(plan.grid()) + len(fresh))
                trials.complete(plan.trials(fresh), progress)
        findings = Findings.of(title, plan, trials.outcomes, chance, data.is_split)
        return findings, write_report(findings, bench.directory)


def _table(plan: Plan, trials: Trials) -> Table:
    """The accuracies so far, by arm and learning rate."""
    table = Table(box=None, pad_edge=False)
    table.add_column("accuracy (%)")
    for rate in plan.learning_rates:
        table.add_column(f"{rate:g}", justify="right")
    for arm in plan.arms:
        table.add_row(arm.name, *(_cell(trials, arm.name, rate) for rate in plan.learning_rates))
    return table


def _cell(trials: Trials, arm: str, rate: float) -> str:
    own = [
        outcome
        for run, outcome in dict(trials.outcomes).items()
        if (run.stage, run.arm, run.learning_rate) == ("selection", arm, rate)
    ]
    values = [outcome.accuracy for outcome in own if outcome.accuracy is not None]
    mean = f"{sum(values) / len(values):.1f}" if values else "-"
    return f"{mean} ({len(own)})"
