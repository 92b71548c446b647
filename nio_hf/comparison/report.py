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
from nio_hf.report.tables import markdown_table
from nio_hf.trials.interval import image_error


def sentences(findings: Findings) -> list[str]:
    """What a comparison says, in words."""
    if not findings.chosen:
        return [f"{len(findings.outcomes)} runs so far; the grid is not through."]
    most = analysis.largest_gain(findings.gains)
    said = []
    if most is not None:
        said.append(
            f"At learning rate {most.learning_rate:g} warmup ({most.warmup_ratio:.0%}) gains most over no warmup on "
            f"the seeds of the selection: {most.gain} points."
        )
    if not findings.plan.verdict_seeds:
        return [*said, "No verdict was asked for."]
    tested = findings.tested_gain
    if not findings.verdicts or tested is None:
        return [*said, "The verdict is still to come."]
    seeds = f"(90% interval over {len(tested.gain.values)} fresh paired seeds)"
    if findings.no_warmup_loses:
        said.append(f"No warmup loses: there warmup gains {tested.gain} points {seeds}.")
    else:
        said.append(
            f"There warmup gains {tested.gain} points {seeds}: these seeds do not tell whether it gains at all."
        )
    added = [
        f"What the initialisation of {share.arm} adds: {share.difference} points over {share.without}, "
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
    words = {
        "beats": "beats warmup",
        "matches": f"matches warmup to {analysis.MARGIN} points",
        "undecided": "against warmup: undecided",
        "worse": "is worse than warmup",
    }
    text = (
        f"{verdict.arm} without warmup {words[verdict.word]}: {verdict.difference} points at the best learning rate of "
        f"each (90% interval over {len(verdict.difference.values)} fresh paired seeds"
        f"{_correction(len(findings.verdicts) - 1)})"
    )
    own, cold = (analysis.stability(findings.cells, arm) for arm in (verdict.arm, NO_WARMUP))
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
    """How uncertain accuracies are beyond what seeds can tell."""
    if findings.images is None:
        return []
    best = max(verdict.accuracy.mean for verdict in findings.verdicts)
    error = image_error(best, findings.images)
    return [
        f"All runs are judged on the same {findings.images:,} images, which the intervals take as given. For other "
        f"images of the same kind an accuracy of {best:.1f}% has a standard error of {error:.2f} points, and a "
        f"difference of up to {math.sqrt(2) * error:.2f}; more seeds do not lower it."
    ]


def grid_rows(findings: Findings) -> list[tuple[str, ...]]:
    """(arm, one accuracy per learning rate, largest stable rate), warmup at its best length for each rate."""
    rows = []
    for arm in findings.plan.arms:
        own = [analysis.at_best_length(findings.cells, arm.name, rate) for rate in findings.plan.learning_rates]
        stable = analysis.stability(findings.cells, arm.name).up_to
        rows.append((arm.name, *map(_cell_text, own), "-" if stable is None else f"{stable:g}"))
    return rows


def _cell_text(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    spread = f" ± {cell.spread:.1f}" if math.isfinite(cell.spread) else ""
    failed = f" ({cell.failed} failed)" if cell.failed else ""
    warmup = f" [{cell.warmup_ratio:.0%}]" if cell.warmup_ratio else ""
    return f"{cell.accuracy:.1f}{spread}{warmup}{failed}"


def verdict_rows(findings: Findings) -> list[tuple[str, ...]]:
    """(arm, learning rate, warmup, cost in steps, accuracy, difference to warmup, word)."""
    rows: list[tuple[str, ...]] = []
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
                f"{verdict.accuracy.mean:.2f} ± {verdict.accuracy.half_width:.2f}",
                "-" if verdict.arm == WARMUP else str(verdict.difference),
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
VERDICT_COLUMNS = ("arm", "learning rate", "warmup", "cost (steps)", "accuracy (%)", "against warmup", "verdict")


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
        "plan": {**dataclasses.asdict(plan), "arms": [dict(dataclasses.asdict(arm)) for arm in plan.arms]},
        "cells": [
            {**dataclasses.asdict(cell), "accuracy": cell.accuracy, "accuracies": list(cell.accuracies.values())}
            for cell in findings.cells
        ],
        "gains_of_warmup": [dataclasses.asdict(gain) for gain in findings.gains],
        "tested_gain": None if findings.tested_gain is None else dataclasses.asdict(findings.tested_gain),
        "stability": {arm.name: dataclasses.asdict(analysis.stability(findings.cells, arm.name)) for arm in plan.arms},
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
        f"## Accuracy (%) by learning rate, on a part of the training data, {plan.seeds} seeds",
        "Mean ± standard deviation over the seeds; in brackets the length of warmup that was best there.",
        markdown_table(grid_columns(plan), grid_rows(findings)),
    ]
    if findings.verdicts:
        parts += [
            f"## On {EVALUATED[findings.images is not None]}, {plan.verdict_seeds} fresh seeds",
            "Each arm at the settings that were best above. Mean ± half of the 90% interval; differences are paired"
            f"{_correction(len(findings.verdicts) - 1)}.",
            markdown_table(VERDICT_COLUMNS, verdict_rows(findings)),
        ]
    parts.append("## Arms")
    parts.append("\n".join(f"- `{arm.name}`: {arm.description}" for arm in plan.arms))
    return "\n\n".join(parts) + "\n"
