"""Plots of studies."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nio_hf.report.style import BLUE, DARK, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, figure, legend_below
from nio_hf.study.diagnostics import FIRST_STEPS
from nio_hf.study.findings import Cell, Findings
from nio_hf.study.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = (DARK, VERMILLION, BLUE, GREEN, ORANGE, PURPLE, SKY, GREY)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
_QUANTITIES = {
    "relative_update": "update / weight (norms)",
    "angular_update": "angle of the update (rad)",
    "output_change": "change of the output",
}


def plot_learning_rates(findings: Findings, target: Path) -> None:
    """Draw the metric and the final training loss of each arm by learning rate.

    At a single learning rate the arms are rows.

    Raises:
        OutputError: A file that cannot be written.
    """
    rates, title = findings.plan.learning_rates, f"mean ± standard deviation over {findings.plan.seeds} seeds"
    if len(rates) == 1:
        _plot_arms(findings, f"{findings.title}, learning rate {rates[0]:g}: {title}", target)
        return
    from matplotlib.ticker import NullFormatter, NullLocator

    with figure(target, width=7.5, height=7) as drawn:
        judged, loss = drawn.subplots(2, sharex=True)
        for arm, style in _styles(findings.plan):
            cells = [cell for rate in rates if (cell := findings.best(arm, rate)) is not None]
            if cells:
                own = [cell.learning_rate for cell in cells]
                judged.errorbar(own, [c.value for c in cells], yerr=_bars(cells), capsize=3, label=arm, **style)
                loss.plot(own, [cell.loss for cell in cells], label=arm, **style)
        for axes in (judged, loss):
            axes.set_xscale("log")
            axes.set_xticks(list(rates), [f"{rate:g}" for rate in rates])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_minor_formatter(NullFormatter())
        judged.set_ylabel(findings.metric.label)
        judged.set_title(f"{findings.title}: {title}")
        loss.set_ylabel("training loss, last tenth")
        loss.set_xlabel("peak learning rate")
        drawn.align_ylabels()
        legend_below(drawn, judged, columns=4)


def _plot_arms(findings: Findings, title: str, target: Path) -> None:
    cells = [cell for arm in findings.plan.arms if (cell := findings.best(arm.name)) is not None]
    with figure(target, width=7.5, height=1.5 + 0.27 * len(cells)) as drawn:
        judged, loss = drawn.subplots(1, 2, sharey=True)
        style = {"color": BLUE, "marker": "o", "markersize": 5, "linestyle": "none"}
        judged.errorbar([c.value for c in cells], range(len(cells)), xerr=_bars(cells), capsize=3, **style)
        loss.plot([cell.loss for cell in cells], range(len(cells)), **style)
        _name_rows(judged, [c.arm + (f" ({c.warmup_ratio:.0%})" if c.warmup_ratio else "") for c in cells])
        judged.set_xlabel(findings.metric.label)
        loss.set_xlabel("training loss, last tenth")
        drawn.suptitle(title, fontsize=11)


def plot_first_steps(findings: Findings, target: Path) -> None:
    """Draw the training loss of the first steps, and the diagnostics of these steps.

    The learning rate is the one at which warmup gains most over no warmup, or the highest in a study without warmup.

    Raises:
        OutputError: A file that cannot be written.
    """
    gain = findings.largest_gain
    rate = max(findings.plan.learning_rates) if gain is None else gain.learning_rate
    quantities = _QUANTITIES if any(outcome.diagnostics for outcome in findings.outcomes.values()) else {}
    with figure(target, width=7.5, height=3.5 + 2.2 * len(quantities)) as drawn:
        panels = drawn.subplots(1 + len(quantities), sharex=True, squeeze=False)[:, 0]
        for arm, style in _styles(findings.plan):
            cell = findings.best(arm, rate)
            if cell is None:
                continue
            key = ("selection", arm, rate, cell.warmup_ratio)
            own = [
                outcome
                for run, outcome in findings.outcomes.items()
                if (run.stage, run.arm, run.learning_rate, run.warmup_ratio) == key
            ]
            line = {name: value for name, value in style.items() if not name.startswith("marker")}
            _draw_mean(panels[0], [outcome.losses[:FIRST_STEPS] for outcome in own], label=arm, **line)
            for axes, quantity in zip(panels[1:], quantities, strict=True):
                _draw_mean(axes, [o.diagnostics[quantity] for o in own if o.diagnostics], label=arm, **line)
        panels[0].set_ylabel("training loss")
        panels[0].set_title(f"First steps at learning rate {rate:g}, mean over the seeds")
        for axes, label in zip(panels[1:], quantities.values(), strict=True):
            axes.set_ylabel(label)
            axes.set_yscale("log")
        panels[-1].set_xlabel("training step")
        drawn.align_ylabels()
        legend_below(drawn, panels[0], columns=4)


def plot_probes(rows: Sequence[tuple[str, Sequence[float], bool]], plan: Plan, title: str, target: Path) -> None:
    """Draw the loss of each probe.

    Args:
        rows: (description, losses, whether it is highlighted) of each candidate, from the top.
        plan: Plan of the search.
        title: Name of the recipe.
        target: PNG file to write.

    Raises:
        OutputError: A file that cannot be written.
    """
    with figure(target, width=8.5, height=1.6 + 0.28 * len(rows)) as drawn:
        axes = drawn.subplots()
        for place, (_, losses, is_marked) in enumerate(rows):
            color = BLUE if is_marked else GREY
            axes.plot(losses, [place] * len(losses), "o", color=color, markersize=4, alpha=0.6)
            axes.plot([statistics.fmean(losses)], [place], "|", color=color, markersize=14, markeredgewidth=2)
        _name_rows(axes, [name for name, _, _ in rows])
        axes.set_xlabel(f"loss after {plan.probe_steps} steps (dots: seeds; bar: mean)")
        axes.set_title(f"{title}: probes")


def _bars(cells: Sequence[Cell]) -> list[float]:
    """Return the standard deviations over the seeds; 0 for a single seed."""
    return [cell.spread if math.isfinite(cell.spread) else 0.0 for cell in cells]


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows from the top."""
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()


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
