"""Table, JSON and plots of a comparison, and what it says in words."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nio_hf.comparison import analysis
from nio_hf.comparison.analysis import Cell, Gain, Outcomes, Share, Verdict
from nio_hf.comparison.arms import NO_WARMUP, WARMUP
from nio_hf.comparison.plan import Choice, Plan
from nio_hf.report.style import BLUE, DARK, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, figure, legend_below
from nio_hf.report.tables import markdown_table
from nio_hf.training.manifest import write_atomically
from nio_hf.training.saving import output_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = (DARK, VERMILLION, BLUE, GREEN, ORANGE, PURPLE, SKY, GREY)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
_FIRST_STEPS = 50
_QUANTITIES = {
    "relative_update": "update / weight (norms)",
    "angular_update": "angle of the update (rad)",
    "output_change": "change of the output",
}


@dataclasses.dataclass(frozen=True)
class Findings:
    """What is known of a comparison so far.

    Attributes:
        title: of the recipe.
        plan: what it consists of.
        outcomes: of the runs that have ended.
        cells: of the grid.
        chosen: settings of each arm; empty while the grid is not through.
        gains: of warmup over no warmup, by learning rate, on the seeds of the selection.
        tested_gain: the largest of them, on fresh seeds; None while there is none.
        verdicts: of each arm; empty while there is none.
        shares: what each initialisation adds; empty likewise.
        is_split: whether the evaluation data are a split of their own.
    """

    title: str
    plan: Plan
    outcomes: Outcomes
    cells: list[Cell]
    chosen: list[Choice]
    gains: list[Gain]
    tested_gain: Gain | None
    verdicts: list[Verdict]
    shares: list[Share]
    is_split: bool = True

    @classmethod
    def of(cls, title: str, plan: Plan, outcomes: Outcomes, chance: float, is_split: bool = True) -> Findings:
        """What follows from some outcomes."""
        found = analysis.cells(plan, outcomes, chance)
        complete = len(found) == sum(len(plan.ratios(arm)) for arm in plan.arms) * len(plan.learning_rates)
        chosen = analysis.choose(found) if complete else []
        gains = analysis.warmup_gains(found)
        verdicts = analysis.verdicts(plan, chosen, outcomes, chance)
        shares = analysis.shares(plan, chosen, outcomes, chance)
        tested = analysis.tested_gain(plan, gains, outcomes, chance) if complete else None
        return cls(title, plan, outcomes, found, chosen, gains, tested, verdicts, shares, is_split)

    @property
    def no_warmup_loses(self) -> bool:
        """Whether warmup gains something for certain: where it does not, there is nothing to replace."""
        return self.tested_gain is not None and self.tested_gain.gain.low > 0


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
        said.append(f"Warmup gains nothing for certain: there it gains {tested.gain} points {seeds}.")
    added = [
        f"What the initialisation of {share.arm} adds: {share.difference} points over {share.without}, "
        "the same training without it."
        for share in findings.shares
    ]
    if not findings.no_warmup_loses:
        return [
            *said,
            *added,
            "So there is no verdict on what replaces it. The differences on fresh seeds are in the table.",
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
        f"each (90% interval over {len(verdict.difference.values)} fresh paired seeds)"
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
            f"## On {EVALUATED[findings.is_split]}, {plan.verdict_seeds} fresh seeds",
            "Each arm at the settings that were best above. Mean ± half of the 90% interval; differences are paired.",
            markdown_table(VERDICT_COLUMNS, verdict_rows(findings)),
        ]
    parts.append("## Arms")
    parts.append("\n".join(f"- `{arm.name}`: {arm.description}" for arm in plan.arms))
    return "\n\n".join(parts) + "\n"


def plot_learning_rates(findings: Findings, target: Path) -> None:
    """Draw accuracy and final training loss of each arm by learning rate: how sensitive it is.

    Raises:
        OutputError: where the file cannot be written.
    """
    with figure(target, width=7.5, height=7) as drawn:
        accuracy, loss = drawn.subplots(2, sharex=True)
        for arm, style in _styles(findings.plan):
            own = [analysis.at_best_length(findings.cells, arm, rate) for rate in findings.plan.learning_rates]
            known = [cell for cell in own if cell is not None]
            if not known:
                continue
            rates = [cell.learning_rate for cell in known]
            errors = [cell.spread if math.isfinite(cell.spread) else 0.0 for cell in known]
            accuracy.errorbar(rates, [cell.accuracy for cell in known], yerr=errors, capsize=3, label=arm, **style)
            loss.plot(rates, [cell.loss for cell in known], label=arm, **style)
        for axes in (accuracy, loss):
            _rate_axis(axes, findings.plan.learning_rates)
        accuracy.set_ylabel("accuracy (%)")
        accuracy.set_title(f"{findings.title}: mean ± standard deviation over {findings.plan.seeds} seeds")
        loss.set_ylabel("training loss, last tenth")
        loss.set_xlabel("peak learning rate")
        drawn.align_ylabels()
        legend_below(drawn, accuracy, columns=4)


def plot_first_steps(findings: Findings, target: Path) -> None:
    """Draw the training loss of the first steps, and what moved in them.

    The learning rate is the one at which warmup gains most over no warmup, or the highest where there is no warmup.

    Raises:
        OutputError: where the file cannot be written.
    """
    gain = analysis.largest_gain(findings.gains)
    rate = max(findings.plan.learning_rates) if gain is None else gain.learning_rate
    looked_at = any(outcome.diagnostics for outcome in findings.outcomes.values())
    quantities = _QUANTITIES if looked_at else {}
    with figure(target, width=7.5, height=3.5 + 2.2 * len(quantities)) as drawn:
        panels = drawn.subplots(1 + len(quantities), sharex=True, squeeze=False)[:, 0]
        for arm, style in _styles(findings.plan):
            cell = analysis.at_best_length(findings.cells, arm, rate)
            if cell is None:
                continue
            own = [
                outcome
                for run, outcome in findings.outcomes.items()
                if (run.stage, run.arm, run.learning_rate, run.warmup_ratio)
                == ("selection", arm, rate, cell.warmup_ratio)
            ]
            line = {key: value for key, value in style.items() if not key.startswith("marker")}
            _draw_mean(panels[0], [outcome.losses[:_FIRST_STEPS] for outcome in own], label=arm, **line)
            for axes, quantity in zip(panels[1:], quantities, strict=True):
                values = [outcome.diagnostics[quantity] for outcome in own if outcome.diagnostics]
                _draw_mean(axes, values, label=arm, **line)
        panels[0].set_ylabel("training loss")
        panels[0].set_title(f"First steps at learning rate {rate:g}, mean over the seeds")
        for axes, label in zip(panels[1:], quantities.values(), strict=True):
            axes.set_ylabel(label)
            axes.set_yscale("log")
        panels[-1].set_xlabel("training step")
        drawn.align_ylabels()
        legend_below(drawn, panels[0], columns=4)


def _styles(plan: Plan) -> list[tuple[str, dict[str, Any]]]:
    looks = zip(itertools.cycle(_COLORS), itertools.cycle(_MARKERS), itertools.cycle(("-", "-", "--")), strict=False)
    return [
        (arm.name, {"color": color, "marker": marker, "markersize": 5, "linestyle": line})
        for arm, (color, marker, line) in zip(plan.arms, looks, strict=False)
    ]


def _draw_mean(axes: Axes, series: Sequence[Sequence[float]], **style: Any) -> None:
    shortest = min(map(len, series), default=0)
    if shortest:
        means = [sum(values[step] for values in series) / len(series) for step in range(shortest)]
        axes.plot(range(1, shortest + 1), means, **style)


def _rate_axis(axes: Axes, rates: Sequence[float]) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_xticks(list(rates), [f"{rate:g}" for rate in rates])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
