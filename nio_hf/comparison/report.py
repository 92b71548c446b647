"""Table and JSON of a comparison, and what it says in words."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from nio_hf.comparison import analysis
from nio_hf.comparison.analysis import Cell, Verdict
from nio_hf.comparison.arms import NO_WARMUP, WARMUP
from nio_hf.comparison.findings import Findings
from nio_hf.comparison.plan import Plan
from nio_hf.comparison.plots import plot_first_steps, plot_learning_rates
from nio_hf.files import output_errors, write_atomically
from nio_hf.metrics import Metric
from nio_hf.report.tables import markdown_table
from nio_hf.trials.interval import gain_text, image_error


def sentences(findings: Findings) -> list[str]:
    """What a comparison says, in words."""
    if not findings.chosen:
        return [f"{len(findings.outcomes)} runs so far; the grid is not through."]
    metric, most = findings.metric, analysis.largest_gain(findings.gains)
    said = []
    if most is not None:
        said.append(
            f"At learning rate {most.learning_rate:g} warmup ({most.warmup_ratio:.0%}) gains most over no warmup on "
            f"the seeds of the selection: {gain_text(metric, most.gain)}."
        )
    if not findings.plan.verdict_seeds:
        return [*said, "No verdict was asked for."]
    tested = findings.tested_gain
    if not findings.verdicts or tested is None:
        return [*said, "The verdict is still to come."]
    measured = f"{gain_text(metric, tested.gain)} (90% interval over {len(tested.gain.values)} fresh paired seeds)"
    if findings.no_warmup_loses:
        said.append(f"No warmup loses: there warmup gains {measured}.")
    else:
        said.append(f"There warmup gains {measured}: these seeds do not tell whether it gains at all.")
    added = [
        f"The initialisation of {share.arm} gains {gain_text(metric, share.difference)} over {share.without}, "
        f"the same training without it{_correction(len(findings.shares))}."
        for share in findings.shares
    ]
    added += _test_set_sentences(findings)
    if not findings.no_warmup_loses:
        return [
            *said,
            *added,
            "So nothing is said about what replaces warmup. The differences on fresh seeds are in the table.",
        ]
    said += [_sentence(verdict, findings) for verdict in findings.verdicts if verdict.arm not in (WARMUP, NO_WARMUP)]
    return [*said, *added]


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
    own, cold = (findings.stability(arm) for arm in (verdict.arm, NO_WARMUP))
    if own.up_to is None:
        return f"{text}; a run fails at every learning rate."
    highest = max(findings.plan.learning_rates)
    at_least = " at least" if own.fails_from is None else ""
    failing = (
        f"no warmup does not fail up to {highest:g}"
        if cold.fails_from is None
        else f"no warmup fails from {cold.fails_from:g} on"
    )
    return f"{text}; stable up to learning rate {own.up_to:g}{at_least}, while {failing}."


def _correction(comparisons: int) -> str:
    return f", Holm-corrected for {comparisons} comparisons" if comparisons > 1 else ""


def _test_set_sentences(findings: Findings) -> list[str]:
    """How uncertain shares of images are beyond what seeds can tell."""
    if findings.evaluated is None or not findings.metric.is_share:
        return []
    best = max((verdict.value.mean for verdict in findings.verdicts), key=findings.metric.merit)
    error = image_error(best, findings.evaluated)
    return [
        f"All runs are judged on the same {findings.evaluated:,} images, which the intervals take as given. For other "
        f"images of the same kind an accuracy of {best:.1f}% has a standard error of {error:.2f} points, and a "
        f"difference of up to {math.sqrt(2) * error:.2f}; more seeds do not lower it."
    ]


def grid_rows(findings: Findings) -> list[tuple[str, ...]]:
    """(arm, one value per learning rate, largest stable rate), warmup at its best length for each rate."""
    rows = []
    for arm in findings.plan.arms:
        own = [findings.at_best_length(arm.name, rate) for rate in findings.plan.learning_rates]
        texts = [_cell_text(cell, findings.metric.grid_digits) for cell in own]
        stable = findings.stability(arm.name).up_to
        rows.append((arm.name, *texts, "-" if stable is None else f"{stable:g}"))
    return rows


def _cell_text(cell: Cell | None, digits: int) -> str:
    if cell is None:
        return "-"
    spread = f" ± {cell.spread:.{digits}f}" if math.isfinite(cell.spread) else ""
    failed = f" ({cell.failed} failed)" if cell.failed else ""
    warmup = f" [{cell.warmup_ratio:.0%}]" if cell.warmup_ratio else ""
    return f"{cell.value:.{digits}f}{spread}{warmup}{failed}"


def verdict_rows(findings: Findings) -> list[tuple[str, ...]]:
    """One row for each arm, as `verdict_columns`."""
    rows: list[tuple[str, ...]] = []
    digits = findings.metric.digits
    for verdict in findings.verdicts:
        choice = verdict.choice
        costs = [
            outcome.cost_steps
            for run, outcome in findings.outcomes.items()
            if run.arm == verdict.arm and run.stage == "verdict"
        ]
        rows.append(
            (
                verdict.arm,
                f"{choice.learning_rate:g}",
                f"{choice.warmup_ratio:.0%}" if choice.warmup_ratio else "-",
                f"{sum(costs) / len(costs):.1f}",
                f"{verdict.value.mean:.{digits}f} ± {verdict.value.half_width:.{digits}f}",
                "-" if verdict.arm == WARMUP else verdict.difference.text(digits),
                verdict.word if findings.no_warmup_loses and verdict.arm != WARMUP else "-",
            )
        )
    return rows


def grid_columns(plan: Plan) -> tuple[str, ...]:
    """The columns of `grid_rows`."""
    return ("arm", *(f"{rate:g}" for rate in plan.learning_rates), "stable up to")


EVALUATED = {
    True: "the evaluation data",
    False: "a part of the training data, drawn anew for each seed, since there is no evaluation split",
}
"""{whether there is an evaluation split: what fresh seeds are judged on}."""


def verdict_columns(metric: Metric) -> tuple[str, ...]:
    """The columns of `verdict_rows`."""
    return ("arm", "learning rate", "warmup", "cost (steps)", metric.label, "gain over warmup", "verdict")


def write_report(findings: Findings, directory: Path) -> dict[str, Path]:
    """Write table, JSON and plots into a directory.

    Returns:
        {what: file}.

    Raises:
        OutputError: where a file cannot be written.
    """
    written = {
        "Table": directory / "comparison.md",
        "Numbers": directory / "comparison.json",
        "Plot by learning rate": directory / "learning_rates.png",
        "Plot of the first steps": directory / "first_steps.png",
    }
    with output_errors(directory, trained=False):
        write_atomically(written["Table"], markdown(findings))
        write_atomically(written["Numbers"], json.dumps(to_dict(findings), indent=1) + "\n")
    plot_learning_rates(findings, written["Plot by learning rate"])
    plot_first_steps(findings, written["Plot of the first steps"])
    return written


def to_dict(findings: Findings) -> dict[str, Any]:
    """The findings in plain values."""
    plan = findings.plan
    return {
        "recipe": findings.title,
        "metric": dataclasses.asdict(findings.metric),
        "plan": {**dataclasses.asdict(plan), "arms": [dict(dataclasses.asdict(arm)) for arm in plan.arms]},
        "cells": [
            {**dataclasses.asdict(cell), "value": cell.value, "values": list(cell.values.values())}
            for cell in findings.cells
        ],
        "gains_of_warmup": [dataclasses.asdict(gain) for gain in findings.gains],
        "tested_gain": None if findings.tested_gain is None else dataclasses.asdict(findings.tested_gain),
        "stability": {arm.name: dataclasses.asdict(findings.stability(arm.name)) for arm in plan.arms},
        "chosen": [dataclasses.asdict(choice) for choice in findings.chosen],
        "verdicts": [dataclasses.asdict(verdict) for verdict in findings.verdicts],
        "shares": [dataclasses.asdict(share) for share in findings.shares],
        "words": sentences(findings),
    }


def markdown(findings: Findings) -> str:
    """The findings as a page of Markdown."""
    plan = findings.plan
    parts = [
        f"# {findings.title}: does it replace warmup?",
        "\n".join(f"- {sentence}" for sentence in sentences(findings)),
        f"Each run has a budget of {plan.steps:,} training steps, from which the initialisation is paid.",
        f"## {findings.metric.heading} by learning rate, on a part of the training data, {plan.seeds} seeds",
        "Mean ± standard deviation over the seeds; in brackets the length of warmup that was best there.",
        markdown_table(grid_columns(plan), grid_rows(findings)),
    ]
    if findings.verdicts:
        parts += [
            f"## On {EVALUATED[findings.evaluated is not None]}, {plan.verdict_seeds} fresh seeds",
            "Each arm at the settings that were best above. Mean ± half of the 90% interval; gains, above 0 where an "
            f"arm is better than warmup, are paired{_correction(len(findings.verdicts) - 1)}.",
            markdown_table(verdict_columns(findings.metric), verdict_rows(findings)),
        ]
    parts.append("## Arms")
    parts.append("\n".join(f"- `{arm.name}`: {arm.description}" for arm in plan.arms))
    return "\n\n".join(parts) + "\n"
