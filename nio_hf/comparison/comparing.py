"""Carry out a comparison: the runs that are missing, then what follows from all of them."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from nio_hf.catalog import recipe_name
from nio_hf.comparison.analysis import cells, choose, largest_gain, warmup_gains
from nio_hf.comparison.arms import CONTROLLED
from nio_hf.comparison.findings import Findings
from nio_hf.comparison.plan import Plan
from nio_hf.comparison.report import write_report
from nio_hf.errors import Problem, RecipeError
from nio_hf.metrics import Metric
from nio_hf.tasks import describe_data
from nio_hf.trials.bench import Bench, Trials
from nio_hf.trials.progress import Progress
from nio_hf.trials.schedule import RunError


def compare(bench: Bench, plan: Plan) -> tuple[Findings, dict[str, Path]]:
    """Carry out the runs that are missing, and write what follows from all of them.

    Returns:
        The findings, and {what: file} of what was written.

    Raises:
        RecipeError: for a budget that the runs do not fit into, results of another comparison in the directory, or
            another process at work in it.
        RunError: for a run that ended without an outcome, and a grid of which every run failed.
    """
    _check_budget(plan)
    recipe = bench.load()
    data, metric = describe_data(recipe), recipe.metric
    worst = metric.worst(data.choices)
    with Trials(bench, recipe, CONTROLLED, steps=plan.steps) as trials:
        with Progress("Comparing", plan.least_runs(), lambda: _table(plan, trials, metric), metric) as progress:
            progress.say(f"{_size(plan)}.")
            trials.complete(plan.trials(plan.grid()), progress)
            if all(outcome.error is not None for outcome in trials.outcomes.values()):
                fix = f"Lower --learning_rates, with another --output_dir; the logs lie in {bench.directory / 'runs'}"
                raise RunError(Problem("runs", "every one failed", fix))
            if plan.verdict_seeds:
                found = cells(plan, trials.outcomes, worst)
                runs = plan.verdict_runs(choose(found, metric))
                most = largest_gain(warmup_gains(found, metric))
                if most is not None:
                    runs += plan.gain_runs(most.learning_rate, most.warmup_ratio)
                fresh = dict.fromkeys(runs)
                progress.expect(len(plan.grid()) + len(fresh))
                trials.complete(plan.trials(fresh), progress)
        title = recipe_name(recipe.path)
        findings = Findings.of(title, plan, trials.outcomes, metric, worst, data.evaluated)
        return findings, write_report(findings, bench.directory)


def _check_budget(plan: Plan) -> None:
    most = plan.most_runs() * plan.steps
    if plan.budget is not None and most > plan.budget:
        fix = "Give more, or fewer --learning_rates, --warmup_ratios, --arms, --seeds or --steps"
        raise RecipeError(Problem("--budget", f"{plan.budget:,} training steps. {_size(plan)}", fix))


def _size(plan: Plan) -> str:
    """What a comparison takes, before it begins."""
    most, chooses = plan.most_runs(), len(plan.grid())
    return (
        f"Up to {most} runs of {plan.steps:,} steps, {most * plan.steps:,} training steps in all: {chooses} runs to "
        "choose learning rate and warmup, the others to judge"
    )


def _table(plan: Plan, trials: Trials, metric: Metric) -> Table:
    """The values so far, by arm and learning rate."""
    table = Table(box=None, pad_edge=False)
    table.add_column(metric.label)
    for rate in plan.learning_rates:
        table.add_column(f"{rate:g}", justify="right")
    for arm in plan.arms:
        table.add_row(arm.name, *(_cell(trials, arm.name, rate, metric) for rate in plan.learning_rates))
    return table


def _cell(trials: Trials, arm: str, rate: float, metric: Metric) -> str:
    own = [
        outcome
        for run, outcome in dict(trials.outcomes).items()
        if (run.stage, run.arm, run.learning_rate) == ("selection", arm, rate)
    ]
    values = [outcome.value for outcome in own if outcome.value is not None]
    mean = f"{sum(values) / len(values):.{metric.grid_digits}f}" if values else "-"
    return f"{mean} ({len(own)})"
