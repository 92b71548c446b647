"""Plots of a comparison."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nio_hf.comparison import analysis
from nio_hf.comparison.analysis import Cell
from nio_hf.comparison.findings import Findings
from nio_hf.comparison.plan import Plan
from nio_hf.report.style import BLUE, DARK, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, figure, legend_below

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


def plot_learning_rates(findings: Findings, target: Path) -> None:
    """Draw the metric and the final training loss of each arm by learning rate: how sensitive it is.

    Of a single learning rate the arms stand beneath each other.

    Raises:
        OutputError: where the file cannot be written.
    """
    if len(findings.plan.learning_rates) == 1:
        _plot_arms(findings, target)
        return
    with figure(target, width=7.5, height=7) as drawn:
        judged, loss = drawn.subplots(2, sharex=True)
        for arm, style in _styles(findings.plan):
            own = [findings.at_best_length(arm, rate) for rate in findings.plan.learning_rates]
            known = [cell for cell in own if cell is not None]
            if not known:
                continue
            rates = [cell.learning_rate for cell in known]
            errors = list(map(_half_bar, known))
            judged.errorbar(rates, [cell.value for cell in known], yerr=errors, capsize=3, label=arm, **style)
            loss.plot(rates, [cell.loss for cell in known], label=arm, **style)
        for axes in (judged, loss):
            _rate_axis(axes, findings.plan.learning_rates)
        judged.set_ylabel(findings.metric.label)
        judged.set_title(f"{findings.title}: mean ± standard deviation over {findings.plan.seeds} seeds")
        loss.set_ylabel("training loss, last tenth")
        loss.set_xlabel("peak learning rate")
        drawn.align_ylabels()
        legend_below(drawn, judged, columns=4)


def _plot_arms(findings: Findings, target: Path) -> None:
    plan = findings.plan
    cells = [findings.at_best_length(arm.name, plan.learning_rates[0]) for arm in plan.arms]
    known = [cell for cell in cells if cell is not None]
    with figure(target, width=7.5, height=1.5 + 0.27 * len(known)) as drawn:
        judged, loss = drawn.subplots(1, 2, sharey=True)
        style = {"color": BLUE, "marker": "o", "markersize": 5, "linestyle": "none"}
        places = range(len(known))
        errors = list(map(_half_bar, known))
        judged.errorbar([cell.value for cell in known], places, xerr=errors, capsize=3, **style)
        loss.plot([cell.loss for cell in known], places, **style)
        judged.set_yticks(
            places, [cell.arm + (f" ({cell.warmup_ratio:.0%})" if cell.warmup_ratio else "") for cell in known]
        )
        judged.invert_yaxis()
        judged.set_xlabel(findings.metric.label)
        loss.set_xlabel("training loss, last tenth")
        drawn.suptitle(
            f"{findings.title}, learning rate {plan.learning_rates[0]:g}: mean ± standard deviation over "
            f"{plan.seeds} seeds",
            fontsize=11,
        )


def _half_bar(cell: Cell) -> float:
    """Standard deviation, or nothing where there is a single seed."""
    return cell.spread if math.isfinite(cell.spread) else 0.0


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
            cell = findings.at_best_length(arm, rate)
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
