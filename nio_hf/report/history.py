"""The plot of an initialisation by iteration: trials, measurements, acceptances and refusals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

from nio_hf.core.result import GradCosine, InitResult, IterationRecord
from nio_hf.report.style import BLUE, DARK, VERMILLION, Target, figure, integer_ticks, legend_below, marker
from nio_hf.report.tables import shape_of_sub_batches

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = {"objective": "objective", "grad_cosine": "GradCosine", "grad_norm": "gradient norm", "loss": "loss"}
_REPORTED: dict[str, Callable[[GradCosine], float]] = {
    "grad_cosine": lambda measured: measured.value,
    "grad_norm": lambda measured: measured.grad_norm,
    "loss": lambda measured: measured.loss,
}
_LONGEST_NAME = 28
_LETTER_HEIGHT = 0.05
"""Height that a letter of a tick label adds, in inches."""


def plot_history(result: InitResult, target: Target) -> None:
    """Draw GradCosine, gradient norm and loss by iteration, with the report batches before and after.

    Computed scales are points beside their bounds: first the refused ones, and the accepted ones as the point after.
    Other methods are curves. An objective other than GradCosine has a panel of its own. A trial without a measurement
    has a tick on the axis alone.

    Args:
        result: Result of `initialize`.
        target: PNG file to write.

    Raises:
        OutputError: A file that cannot be written.
    """
    history, config = result.history, result.config
    is_computed = result.method == "nio" and config.search == "balance"
    refused = [record for record in history if record.outcome in ("loss_bound", "least_norm")]
    names = ["before", *(_shorten(record.tried) for record in refused), "after"] if is_computed else []
    has_objective = any(record.objective is not None for record in history)
    panels_of = list(_NAMES)[not has_objective :]
    height = 2.5 * len(panels_of) + _LETTER_HEIGHT * max(map(len, names), default=0)
    with figure(target, width=7, height=height) as drawn:
        panels = dict(zip(panels_of, drawn.subplots(len(panels_of), sharex=True), strict=True))
        for name, axes in panels.items():
            axes.set_ylabel(_NAMES[name])
            if is_computed:
                _draw_refused(axes, refused, name)
            else:
                _draw_curve(axes, result, name)
            if name in _REPORTED:
                last = len(refused if is_computed else history) + 1
                _draw_reports(axes, result, _REPORTED[name], last)
        if is_computed:
            _draw_bounds(panels["loss"], panels["grad_norm"], result)
            panels["loss"].set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        else:
            _draw_gamma(panels["grad_norm"], result)
            panels["loss"].set_xlabel(f"{result.title} iteration")
            integer_ticks(panels["loss"])
        overlap = f", overlap {config.overlap:g}" if config.overlap else ""
        panels[panels_of[0]].set_title(f"{result.title} ({shape_of_sub_batches(result.before)}{overlap})")
        drawn.align_ylabels()
        legend_below(drawn, *panels.values(), columns=2)


def _draw_curve(axes: Axes, result: InitResult, name: str) -> None:
    values = [math.nan if (value := getattr(record, name)) is None else value for record in result.history]
    if not all(map(math.isnan, values)):
        axes.plot([record.iteration for record in result.history], values, color=BLUE, label="batch of the iteration")


def _draw_refused(axes: Axes, refused: list[IterationRecord], name: str) -> None:
    points = [(at, value) for at, record in enumerate(refused, 1) if (value := getattr(record, name)) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label="refused: broke a bound", **marker(VERMILLION, "o", is_open=True))


def _draw_reports(axes: Axes, result: InitResult, measure: Callable[[GradCosine], float], last: int) -> None:
    """Draw the report batches before the first iteration and after the last."""
    reports = {"before": (0, result.before), "after": (last, result.after)}
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


def _draw_bounds(loss: Axes, norm: Axes, result: InitResult) -> None:
    config, before = result.config, result.before
    if config.loss_bound is not None:
        most = before.loss + config.loss_bound * abs(before.loss)
        loss.axhline(most, color=VERMILLION, linestyle="--", linewidth=1, label=f"loss bound: {most:.4g}")
    if config.least_norm is not None:
        least = config.least_norm * before.grad_norm
        norm.axhline(least, color=VERMILLION, linestyle=":", linewidth=1.5, label=f"least norm: {least:.4g}")


def _draw_gamma(axes: Axes, result: InitResult) -> None:
    """Draw gamma, and marks at the iterations that lowered the gradient norm instead of the objective."""
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


def _shorten(name: str) -> str:
    """Return a name for an axis; a long one is cut to its end, which tells more."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"
