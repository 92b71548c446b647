"""The plot of a run by iteration: what was tried, measured, accepted and refused."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nio_hf.core.result import GradCosine, InitResult, Outcome
from nio_hf.report.style import BLUE, DARK, GREY, VERMILLION, Target, figure, integer_ticks, legend_below, marker
from nio_hf.report.tables import shape_of_sub_batches

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = {"objective": "objective", "grad_cosine": "GradCosine", "grad_norm": "gradient norm", "loss": "loss"}
_REPORTED: dict[str, Callable[[GradCosine], float]] = {
    "grad_cosine": lambda measured: measured.value,
    "grad_norm": lambda measured: measured.grad_norm,
    "loss": lambda measured: measured.loss,
}
_LOOKS: dict[str, tuple[dict[str, Any], tuple[Outcome, ...]]] = {
    "start, or accepted": (marker(BLUE, "o"), ("start", "accepted")),
    "refused: bound on loss or gradient norm": (marker(VERMILLION, "o", is_open=True), ("loss_bound", "norm_band")),
    "refused: not better": (marker(BLUE, "o", is_open=True), ("no_gain", "noise", "worse")),
}
"""{label: (marker, outcomes of the trials that have it)}."""
_BEYOND = marker(VERMILLION, "^", is_open=True)
_KEPT: tuple[Outcome, ...] = ("start", "accepted")
_MOST_NAMES = 24
_LONGEST_NAME = 28
_LETTER_HEIGHT = 0.05
"""Inches that a letter of a tick label adds to the height."""


def plot_history(result: InitResult, target: Target) -> None:
    """Draw GradCosine, gradient norm and loss by iteration, with the report batches before and after.

    A search that measures its start judges each trial against it: its trials are points, filled where they were
    accepted, with the bounds that they had to keep. Other methods are curves. The objective has a panel of its own
    where it is not GradCosine. A trial that could not be measured is in the last panel alone.

    Args:
        result: of `initialize`.
        target: PNG file to write.

    Raises:
        OutputError: where the file cannot be written.
    """
    history, config = result.history, result.config
    has_trials = bool(history) and history[0].outcome == "start"
    ticks = _trial_names(result) if has_trials and len(history) <= _MOST_NAMES else ()
    is_gc = all(record.objective in (None, record.grad_cosine) for record in history)
    names = list(_NAMES)[is_gc:]
    height = 2.5 * len(names) + _LETTER_HEIGHT * max(map(len, ticks), default=0)
    with figure(target, width=7, height=height) as drawn:
        panels = dict(zip(names, drawn.subplots(len(names), sharex=True), strict=True))
        for name, axes in panels.items():
            axes.set_ylabel(_NAMES[name])
            (_draw_trials if has_trials else _draw_curve)(axes, result, name)
            if name in _REPORTED:
                _draw_reports(axes, result, _REPORTED[name])
        if has_trials:
            _draw_bounds(panels["loss"], panels["grad_norm"], result)
        _draw_gamma(panels["grad_norm"], result)
        overlap = f", overlap {config.overlap:g}" if config.overlap else ""
        panels[names[0]].set_title(f"{result.title} on search batches ({shape_of_sub_batches(result.before)}{overlap})")
        if ticks:
            panels["loss"].set_xticks(range(len(ticks)), ticks, rotation=45, ha="right", rotation_mode="anchor")
        else:
            panels["loss"].set_xlabel(f"{result.title} iteration")
            integer_ticks(panels["loss"])
        drawn.align_ylabels()
        legend_below(drawn, *panels.values(), columns=2)


def _draw_curve(axes: Axes, result: InitResult, name: str) -> None:
    values = [math.nan if (value := getattr(record, name)) is None else value for record in result.history]
    if not all(map(math.isnan, values)):
        axes.plot([record.iteration for record in result.history], values, color=BLUE, label="search batches")


def _draw_trials(axes: Axes, result: InitResult, name: str) -> None:
    """Draw each trial, and a line at the value of what was accepted last."""
    size = 5 if len(result.history) <= _MOST_NAMES else 3.5
    trials = [(record, getattr(record, name)) for record in result.history if getattr(record, name) is not None]
    low, high = _view(result, name)
    for label, (look, outcomes) in _LOOKS.items():
        points = [(record.iteration, value) for record, value in trials if record.outcome in outcomes]
        _draw_points(axes, [(at, value) for at, value in points if low <= value <= high], label, look, size)
        beyond = [(at, low if value < low else high) for at, value in points if not low <= value <= high]
        _draw_points(axes, beyond, "refused, beyond the axis or not finite", _BEYOND, size)
    accepted = [(record.iteration, value) for record, value in trials if record.outcome in ("start", "accepted")]
    steps = [*accepted, (len(result.history), accepted[-1][1])]
    axes.plot(*zip(*steps, strict=True), color=BLUE, linewidth=0.8, drawstyle="steps-post", zorder=1)


def _draw_points(
    axes: Axes, points: Sequence[tuple[int, float]], label: str, look: dict[str, Any], size: float
) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **(look | {"markersize": size}))


def _draw_reports(axes: Axes, result: InitResult, measure: Callable[[GradCosine], float]) -> None:
    """Draw the report batches in front of the first iteration and behind the last."""
    reports = {"before": (0, result.before), "after": (len(result.history) + 1, result.after)}
    for when, (position, measured) in reports.items():
        values = [measure(part) for part in measured.parts]
        axes.errorbar(
            position,
            measure(measured),
            yerr=statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
            color=DARK,
            capsize=3,
            zorder=3,
            label=f"report batches {when} (± standard error)",
            **marker(DARK, "D", is_open=when == "before"),
        )


def _view(result: InitResult, name: str) -> tuple[float, float]:
    """What a panel shows: what was kept and the bounds on it, and as much again on both sides."""
    if name not in ("loss", "grad_norm"):
        return -math.inf, math.inf
    kept = [getattr(record, name) for record in result.history if record.outcome in _KEPT]
    bounds = [_most_loss(result)] if name == "loss" else [edge for _, _, *edges in _bands(result) for edge in edges]
    reports = [_REPORTED[name](measured) for measured in (result.before, result.after)]
    shown = [value for value in (*kept, *bounds, *reports) if value is not None]
    room = (max(shown) - min(shown)) or 1.0
    return min(shown) - room, max(shown) + room


def _most_loss(result: InitResult) -> float | None:
    """The bound on the loss at an accepted point; None without one."""
    bound, start = result.config.loss_bound, result.history[0].loss
    return None if bound is None else start + bound * abs(start)


def _bands(result: InitResult) -> list[tuple[float, float, float, float | None]]:
    """(left, right, least, most) of the gradient norm at an accepted point: of the common factor, of the groups.

    The common factor of a scan has no largest norm.
    """
    band, norms = result.config.norm_band, _norms_of_common_factor(result)
    turn, end = _groups_begin(result), len(result.history) + 0.5
    if band is None:
        return []
    open_above = result.config.search == "scan"
    common_stage = (0.5, turn, band[0] * norms[0], None if open_above else band[1] * norms[0])
    stages = [common_stage, (turn, end, band[0] * norms[-1], band[1] * norms[-1])]
    return [stage for stage in stages if stage[0] < stage[1]]


def _groups_begin(result: InitResult) -> float:
    """Where on the x axis the trials of groups begin; behind the last iteration where there are none."""
    tried = [record.iteration for record in result.history if record.group is not None]
    return (tried[0] if tried else len(result.history) + 1) - 0.5


def _norms_of_common_factor(result: InitResult) -> list[float]:
    """The gradient norm at the start and at what was accepted before groups were tried."""
    kept = [record for record in result.history if record.group is None and record.outcome in _KEPT]
    return [record.grad_norm for record in kept if record.grad_norm is not None]


def _draw_bounds(loss: Axes, norm: Axes, result: InitResult) -> None:
    most = _most_loss(result)
    if most is not None:
        loss.axhline(most, color=VERMILLION, linestyle="--", linewidth=1, label=f"loss bound: {most:.4g}")
    for left, right, least, greatest in _bands(result):
        if greatest is None:
            norm.hlines(least, left, right, color=VERMILLION, linestyle="--", linewidth=1, label="least norm")
        else:
            sides = [left, right]
            norm.fill_between(sides, least, greatest, color=GREY, alpha=0.2, linewidth=0, label="band of the norm")


def _draw_gamma(axes: Axes, result: InitResult) -> None:
    """Draw gamma, and a rug of the iterations that lowered the gradient norm instead of the objective."""
    gamma = result.config.gamma
    if gamma is not None:
        axes.axhline(gamma, color=VERMILLION, linestyle="--", label=f"gamma = {gamma:.4g}")
    lowering = [record.iteration for record in result.history if record.outcome == "lower_norm"]
    if lowering:
        axes.margins(y=0.15)
        axes.plot(
            lowering,
            [0.96] * len(lowering),
            transform=axes.get_xaxis_transform(),
            label=f"steps that lower the norm ({len(lowering)} of {len(result.history)})",
            **{**marker(VERMILLION, "|"), "markersize": 8},
        )


def _trial_names(result: InitResult) -> list[str]:
    """What stands on the x axis: "before", what was tried, "after". Of long names the end tells more."""
    names = ["before", *(record.tried for record in result.history), "after"]
    return [name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}" for name in names]
