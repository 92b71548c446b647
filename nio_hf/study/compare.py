"""`nio-hf compare`: does an initialisation replace warmup?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from nio_hf.errors import Problem, RecipeError
from nio_hf.recipe.loading import Recipe
from nio_hf.study.arms import NO_WARMUP, WARMUP
from nio_hf.study.findings import Cell, Findings, Verdict
from nio_hf.study.intervals import gain_text, image_error
from nio_hf.study.options import Report, TableOf
from nio_hf.study.plan import MIN_SEEDS, Plan, are_distinct, grid_problems, seed_problems
from nio_hf.study.plots import plot_first_steps, plot_learning_rates
from nio_hf.study.runner import RunError, Study
from nio_hf.tasks import describe_data

_GRID_NOTE = "Mean ± standard deviation over the seeds; in brackets the length of warmup that was best there."
RATE_FACTORS = (0.5, 1.0, 2.0, 4.0)
"""Default learning rates of the grid, as multiples of the learning rate of the recipe."""


def default_rates(recipe: Recipe) -> str:
    """Return the default learning rates of the grid, between commas."""
    return ",".join(f"{factor * recipe.training.learning_rate:.6g}" for factor in RATE_FACTORS)


def compare(study: Study) -> Findings:
    """Carry out the missing runs of a comparison, and return its findings.

    Raises:
        RecipeError: A budget that the runs exceed, results of another comparison in the directory, or another process
            at work in it.
        RunError: A run that ended without an outcome, or a grid in which every run failed.
    """
    plan, metric = study.plan, study.recipe.metric
    grid, most = plan.selection(), most_runs(plan)
    size = (
        f"Up to {most} runs of {plan.steps:,} steps, {most * plan.steps:,} training steps in all: {len(grid)} runs to "
        "choose learning rate and warmup, the others to judge"
    )
    if plan.budget is not None and most * plan.steps > plan.budget:
        fix = "Give more, or fewer --learning_rates, --warmup_ratios, --arms, --seeds or --steps"
        raise RecipeError(Problem("--budget", f"{plan.budget:,} training steps. {size}", fix))
    data = describe_data(study.recipe)

    def find() -> Findings:
        worst = metric.worst(data.choices)
        return Findings(study.title, plan, dict(study.outcomes), metric, worst, data.evaluated)

    with study.opened(most - 2 * plan.verdict_seeds):
        study.say(f"{size}.")
        study.complete(grid)
        if all(outcome.error is not None for outcome in study.outcomes.values()):
            fix = f"Lower --learning_rates, with another --output_dir; the logs lie in {study.runs}"
            raise RunError(Problem("runs", "every one failed", fix))
        fresh = plan.fresh(find().judged)
        study.complete(fresh, len(grid) + len(fresh))
    return find()


def most_runs(plan: Plan) -> int:
    """Return the largest number of runs: the verdict may need warmup and no warmup at two further settings."""
    return len(plan.selection()) + plan.verdict_seeds * (len(plan.arms) + 2)


def plan_problems(plan: Plan) -> Iterator[Problem]:
    """Yield the problems of a comparison, with the options that cause them."""
    yield from seed_problems(plan)
    yield from grid_problems("--learning_rates", plan.learning_rates, "5e-4,1e-3,2e-3")
    ratios, warms_up = ", ".join(f"{ratio:g}" for ratio in plan.warmup_ratios), any(a.has_warmup for a in plan.arms)
    if any(not 0 < ratio < 1 for ratio in plan.warmup_ratios) or not are_distinct(plan.warmup_ratios):
        yield Problem("--warmup_ratios", ratios, "Give different shares of the steps in (0, 1)")
    elif warms_up and not ratios:
        yield Problem("--warmup_ratios", "none, with an arm that warms up", "Give at least one, e.g. 0.1")
    elif warms_up and round(min(plan.warmup_ratios) * plan.steps) < 1:
        found = f"{ratios}, of which the least is no whole step of {plan.steps}"
        yield Problem("--warmup_ratios", found, f"Give {1 / max(plan.steps, 1):.2g} or more")
    if plan.verdict_seeds:
        if min(plan.verdict_seeds, plan.seeds) < MIN_SEEDS:
            found = f"{plan.seeds} to choose by and {plan.verdict_seeds} to judge by"
            fix = f"Give {MIN_SEEDS} or more of both for a verdict, or --no_verdict"
            yield Problem("--seeds, --verdict_seeds", found, fix)
        missing = [name for name in (NO_WARMUP, WARMUP) if name not in {arm.name for arm in plan.arms}]
        if missing:
            fix = "Add it to --arms, or give --no_verdict"
            yield Problem("--arms", f"no {' and no '.join(missing)} to compare the others with", fix)


def recipe_problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield the problem of an optimizer that the recipe chooses, since each arm has its own."""
    if recipe.optimization.optimizer is not None:
        where = recipe.settings["optimizer"].where
        found = f"{recipe.optimization.optimizer!r}, and each arm of a comparison has an optimizer of its own"
        yield Problem(where, found, "Leave it out, and name the arm of that optimizer in --arms")


def sentences(findings: Findings) -> list[str]:
    """Return the conclusions of a comparison in words."""
    if not findings.chosen:
        return [f"{len(findings.outcomes)} runs so far; the grid is not complete."]
    metric, most, tested = findings.metric, findings.largest_gain, findings.tested_gain
    said = []
    if most is not None:
        said.append(
            f"At learning rate {most.learning_rate:g} warmup ({most.warmup_ratio:.0%}) gains most over no warmup on "
            f"the seeds of the selection: {gain_text(metric, most.gain)}."
        )
    if not findings.plan.verdict_seeds:
        return [*said, "No verdict was asked for."]
    if not findings.verdicts or tested is None:
        return [*said, "The verdict is still to come."]
    measured = f"{gain_text(metric, tested.gain)} (90% interval over {len(tested.gain.values)} fresh paired seeds)"
    if findings.no_warmup_loses:
        said.append(f"Judged anew there, it gains {measured}, so there is something to replace.")
        said += [_sentence(one, findings) for one in findings.verdicts if one.arm not in (WARMUP, NO_WARMUP)]
    else:
        said.append(f"Judged anew there, it gains {measured}: these seeds do not tell whether it gains at all.")
    said += [
        f"The initialisation of {share.arm} gains {gain_text(metric, share.difference)} over {share.without}, "
        f"the same training without it{_correction(len(findings.shares))}."
        for share in findings.shares
    ]
    if findings.evaluated is not None and metric.is_share:
        best = max((verdict.value.mean for verdict in findings.verdicts), key=metric.merit)
        error = image_error(best, findings.evaluated)
        said.append(
            f"All runs are judged on the same {findings.evaluated:,} images, which the intervals take as given. For "
            f"other images of the same kind an accuracy of {best:.1f}% has a standard error of {error:.2f} points, and "
            f"a difference of up to {math.sqrt(2) * error:.2f}; more seeds do not lower it."
        )
    if not findings.no_warmup_loses:
        said.append("So it does not tell what replaces warmup. The differences on fresh seeds are in the table.")
    return said


def _sentence(verdict: Verdict, findings: Findings) -> str:
    metric = findings.metric
    words = {
        "beats": "beats warmup",
        "matches": f"matches warmup to {metric.margin:g} {metric.points}",
        "undecided": "against warmup: undecided",
        "worse": "is worse than warmup",
    }
    text = (
        f"{verdict.arm} without warmup {words[verdict.word]}: a gain of {gain_text(metric, verdict.difference)} at the "
        f"best learning rate of each (90% interval over {len(verdict.difference.values)} fresh paired seeds"
        f"{_correction(len(findings.verdicts) - 1)})"
    )
    own, cold = findings.stability(verdict.arm), findings.stability(NO_WARMUP).fails_from
    if own.up_to is None:
        return f"{text}; a run fails at every learning rate."
    at_least = " at least" if own.fails_from is None else ""
    highest = max(findings.plan.learning_rates)
    failing = f"does not fail up to {highest:g}" if cold is None else f"fails from {cold:g} on"
    return f"{text}; stable up to learning rate {own.up_to:g}{at_least}, while no warmup {failing}."


def _correction(comparisons: int) -> str:
    return f", Holm-corrected for {comparisons} comparisons" if comparisons > 1 else ""


def grid_table(findings: Findings) -> TableOf:
    """Return a row for each arm: its value at each learning rate, at the best warmup, and its highest stable rate."""
    rates = findings.plan.learning_rates
    rows = []
    for arm in findings.plan.arms:
        texts = [_cell_text(findings.best(arm.name, rate), findings.metric.digits - 1) for rate in rates]
        stable = findings.stability(arm.name).up_to
        rows.append((arm.name, *texts, "-" if stable is None else f"{stable:g}"))
    return ("arm", *(f"{rate:g}" for rate in rates), "stable up to"), rows


def _cell_text(cell: Cell | None, digits: int) -> str:
    if cell is None:
        return "-"
    spread = f" ± {cell.spread:.{digits}f}" if math.isfinite(cell.spread) else ""
    failed = f" ({cell.failed} failed)" if cell.failed else ""
    warmup = f" [{cell.warmup_ratio:.0%}]" if cell.warmup_ratio else ""
    return f"{cell.value:.{digits}f}{spread}{warmup}{failed}"


def verdict_table(findings: Findings) -> TableOf:
    """Return a row for each arm on the fresh seeds."""
    columns = ("arm", "learning rate", "warmup", "cost (steps)", findings.metric.label, "gain over warmup", "verdict")
    rows: list[tuple[str, ...]] = []
    digits = findings.metric.digits
    for verdict in findings.verdicts:
        name, choice = verdict.arm, verdict.choice
        own = [outcome for run, outcome in findings.outcomes.items() if (run.arm, run.stage) == (name, "verdict")]
        row = (
            name,
            f"{choice.learning_rate:g}",
            f"{choice.warmup_ratio:.0%}" if choice.warmup_ratio else "-",
            f"{sum(outcome.cost_steps for outcome in own) / len(own):.1f}",
            f"{verdict.value.mean:.{digits}f} ± {verdict.value.half_width:.{digits}f}",
            "-" if name == WARMUP else verdict.difference.text(digits),
            verdict.word if findings.no_warmup_loses and name != WARMUP else "-",
        )
        rows.append(row)
    return columns, rows


def make_report(findings: Findings) -> Report:
    """Return the report of a comparison."""
    plan = findings.plan
    budget = f"Each run has a budget of {plan.steps:,} training steps, from which the initialisation is paid."
    grid = f"{findings.metric.heading} by learning rate, on a part of the training data, {plan.seeds} seeds"
    sections: dict[str, tuple[str, TableOf | None]] = {grid: (f"{budget}\n\n{_GRID_NOTE}", grid_table(findings))}
    if findings.verdicts:
        judged_on = "a part of the training data, drawn anew for each seed, since there is no evaluation split"
        if findings.evaluated is not None:
            judged_on = "the evaluation data"
        sections[f"On {judged_on}, {plan.verdict_seeds} fresh seeds"] = (
            "Each arm at the settings that were best above. Mean ± half of the 90% interval; gains, above 0 where an "
            f"arm is better than warmup, are paired{_correction(len(findings.verdicts) - 1)}.",
            verdict_table(findings),
        )
    sections["Arms"] = ("\n".join(f"- `{arm.name}`: {arm.description}" for arm in plan.arms), None)
    plots = {
        "Plot by learning rate": ("learning_rates.png", lambda file: plot_learning_rates(findings, file)),
        "Plot of the first steps": ("first_steps.png", lambda file: plot_first_steps(findings, file)),
    }
    said = sentences(findings)
    return Report(findings.title, "does it replace warmup?", said, sections, to_dict(findings), plots)


def to_dict(findings: Findings) -> dict[str, Any]:
    """Return the findings in plain values."""
    plain = dataclasses.asdict

    def plain_cell(cell: Cell) -> dict[str, Any]:
        return {**plain(cell), "value": cell.value, "values": list(cell.values.values())}

    return {
        "recipe": findings.title,
        "metric": plain(findings.metric),
        "plan": plain(findings.plan),
        "cells": [plain_cell(cell) for cell in findings.cells],
        "gains_of_warmup": [plain(gain) for gain in findings.gains],
        "tested_gain": None if findings.tested_gain is None else plain(findings.tested_gain),
        "stability": {arm.name: plain(findings.stability(arm.name)) for arm in findings.plan.arms},
        "chosen": [plain_cell(cell) for cell in findings.chosen],
        "verdicts": [{**plain(one), "choice": plain_cell(one.choice)} for one in findings.verdicts],
        "shares": [plain(share) for share in findings.shares],
        "words": sentences(findings),
    }
