"""The plots of a run."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nio_hf.core.layerwise import GradientInspection, LayerGradient
from nio_hf.core.result import InitResult, TensorScale
from nio_hf.report.history import plot_history
from nio_hf.report.run import Run
from nio_hf.report.style import (
    BLUE,
    DARK,
    ROUND_STEPS,
    VERMILLION,
    Target,
    figure,
    group_marker,
    integer_ticks,
    kind_marker,
    kind_order,
    legend_below,
    mark_blocks,
)
from nio_hf.report.tables import MOST_GROUPS, shape_of_sub_batches

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLOCK_WIDTH = 0.8
_FEW_POINTS = 30
_PLOT_NAMES = ("nio_scales.png", "nio_history.png", "training.png", "inspection.png")
_FINE_TICKS_UP_TO = 3.0


def plot_scales(result: InitResult, target: Target) -> None:
    """Draw the scale of each tensor by the depth of its block. Colours are groups, or kinds for one or many groups.

    The y axis is logarithmic and symmetric around 1, so that a scale and its inverse are equally far from the line.

    Args:
        result: Result of `initialize`.
        target: PNG file to write.

    Raises:
        OutputError: A file that cannot be written.
    """
    blocks = sorted({tensor.depth for tensor in result.tensors})
    with figure(target, width=min(max(6.5, 0.34 * len(blocks) + 2), 16), height=4.4) as drawn:
        axes = drawn.subplots()
        places = _places_of(result.tensors)
        for label, (look, tensors) in _legend(result).items():
            scales = [tensor.omega for tensor in tensors]
            axes.plot([places[tensor.name] for tensor in tensors], scales, label=label, **look)
        axes.axhline(1, color=DARK, linewidth=0.8, zorder=1)
        _symmetric_log_scale(axes, [tensor.omega for tensor in result.tensors])
        mark_blocks(axes, blocks)
        axes.set_ylabel("scale (omega)")
        groups = f"{len(result.groups)} group{'s' if len(result.groups) > 1 else ''}"
        axes.set_title(f"Scales of {result.title}: {len(result.tensors)} tensors in {groups}")
        legend_below(drawn, axes)


def plot_training(log_history: Sequence[Mapping[str, Any]], target: Target) -> None:
    """Draw training loss, evaluation loss and evaluation accuracy by step.

    Args:
        log_history: Log history of [`~transformers.TrainerState`]; entries without these quantities are skipped.
        target: PNG file to write.

    Raises:
        OutputError: A file that cannot be written.
    """
    training, evaluation, accuracy = (_series(log_history, key) for key in ("loss", "eval_loss", "eval_accuracy"))
    with figure(target, width=7, height=5.5 if accuracy else 3.8) as drawn:
        panels = drawn.subplots(1 + bool(accuracy), sharex=True, squeeze=False)[:, 0]
        _draw_series(panels[0], training, BLUE, "training", marker="." if len(training) < _FEW_POINTS else "")
        _draw_series(panels[0], evaluation, VERMILLION, "evaluation", marker="o")
        panels[0].set_ylabel("loss")
        panels[0].set_title("Training")
        if accuracy:
            percent = [(step, 100 * value) for step, value in accuracy]
            _draw_series(panels[1], percent, VERMILLION, "evaluation", marker="o")
            panels[1].set_ylabel("accuracy (%)")
        if not (training or evaluation):
            panels[0].set_title("Training: no loss was logged, lower logging_steps to see it")
        panels[-1].set_xlabel("training step")
        integer_ticks(panels[-1])
        drawn.align_ylabels()
        legend_below(drawn, *panels)


def draw_run(run: Run, directory: Path) -> dict[str, Path]:
    """Draw the plots of a run into a directory, in place of the plots of an earlier run.

    Returns:
        {description: PNG file}.

    Raises:
        OutputError: A file that cannot be written.
    """
    for stale in _PLOT_NAMES:
        (directory / stale).unlink(missing_ok=True)
    scales, history, training, inspection = (directory / name for name in _PLOT_NAMES)
    drawn: dict[str, Path] = {}
    if run.result is not None:
        plot_scales(run.result, scales)
        drawn["Plot of the scales"] = scales
        if run.result.history:
            plot_history(run.result, history)
            drawn[f"Plot of {run.result.title} by iteration"] = history
    if run.is_trained:
        plot_training(run.log_history, training)
        drawn["Plot of the training"] = training
    if run.inspection is not None:
        plot_inspection(run.inspection, inspection)
        drawn["Plot by layer"] = inspection
    return drawn


def plot_inspection(inspection: GradientInspection, target: Target) -> None:
    """Draw the agreement of the gradients of sub-batches, and the share of the gradient, by block and kind.

    The upper panel has the agreement a_l, the lower one the share s_l of the squared norm; GC is the sum of s_l a_l.

    Args:
        inspection: Result of `inspect_gradients`.
        target: PNG file to write.

    Raises:
        OutputError: A file that cannot be written.
    """
    groups = inspection.grouped(lambda layer: (layer.kind, layer.depth))
    kinds = sorted({kind for kind, _ in groups}, key=kind_order)
    blocks = sorted({depth for _, depth in groups})
    measured = inspection.measured
    with figure(target, width=min(max(7.5, 0.4 * len(blocks) + 2), 16), height=7) as drawn:
        agreement, share = drawn.subplots(2, sharex=True)
        _draw_agreement(agreement, groups, kinds)
        agreement.axhline(measured.value, color=DARK, linestyle="--", label=f"whole gradient: {measured.value:.3g}")
        if any(group.agreement < 0 for group in groups.values()):
            agreement.axhline(0, color=DARK, linewidth=0.8)
        agreement.set_ylabel("agreement of sub-batches")
        agreement.set_title(
            f"GradCosine {measured.value:.4g}, gradient norm {measured.grad_norm:.4g}, loss {measured.loss:.4g} "
            f"({shape_of_sub_batches(measured)})"
        )
        _draw_shares(share, groups, kinds)
        share.set_ylabel("share of the squared norm (%)")
        share.set_title("Where the gradient is, in the same colours")
        mark_blocks(agreement, blocks)
        agreement.set_xlabel("")
        mark_blocks(share, blocks)
        drawn.align_ylabels()
        legend_below(drawn, agreement, columns=4)


def _draw_agreement(axes: Axes, groups: Mapping[tuple[str, int], LayerGradient], kinds: Sequence[str]) -> None:
    for position, kind in enumerate(kinds):
        offset = _BLOCK_WIDTH * ((position + 0.5) / len(kinds) - 0.5)
        points = [(depth + offset, group.agreement) for (own, depth), group in groups.items() if own == kind]
        places, values = zip(*points, strict=True)
        axes.plot(places, values, label=kind, **kind_marker(kind))


def _draw_shares(axes: Axes, groups: Mapping[tuple[str, int], LayerGradient], kinds: Sequence[str]) -> None:
    """Draw the shares as stacked bars."""
    heights: dict[int, float] = collections.defaultdict(float)
    for kind in kinds:
        color = kind_marker(kind)["markeredgecolor"]
        for (own, depth), group in groups.items():
            if own == kind:
                axes.bar(depth, 100 * group.share, width=_BLOCK_WIDTH, bottom=heights[depth], color=color)
                heights[depth] += 100 * group.share


def _legend(result: InitResult) -> dict[str, tuple[dict[str, Any], list[TensorScale]]]:
    """Return {label: (marker, tensors)}."""
    tensors = result.tensors
    if 1 < len(result.groups) <= MOST_GROUPS:
        return {
            f"{group.name}: {group.omega:.3g}": (
                group_marker(position),
                [tensor for tensor in tensors if tensor.group == group.name],
            )
            for position, group in enumerate(result.groups)
        }
    kinds = sorted({tensor.kind for tensor in tensors}, key=kind_order)
    return {kind: (kind_marker(kind), [tensor for tensor in tensors if tensor.kind == kind]) for kind in kinds}


def _places_of(tensors: Sequence[TensorScale]) -> dict[str, float]:
    """Return {name of a tensor: x}. The tensors of a block stand side by side, ordered by kind."""
    blocks = collections.defaultdict(list)
    for tensor in tensors:
        blocks[tensor.depth].append(tensor)
    return {
        tensor.name: depth + _BLOCK_WIDTH * ((position + 0.5) / len(members) - 0.5)
        for depth, members in blocks.items()
        for position, tensor in enumerate(sorted(members, key=lambda member: kind_order(member.kind)))
    }


def _symmetric_log_scale(axes: Axes, scales: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    axes.set_yscale("log")
    reach = max((abs(math.log(scale)) for scale in scales), default=0.0)
    limit = math.exp(max(1.12 * reach, 0.02))
    axes.set_ylim(1 / limit, limit)
    fine = limit < _FINE_TICKS_UP_TO
    axes.yaxis.set_major_locator(MaxNLocator(9, steps=ROUND_STEPS) if fine else LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _series(log_history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in log_history if key in entry]


def _draw_series(axes: Axes, series: Sequence[tuple[int, float]], color: str, label: str, marker: str) -> None:
    if series:
        steps, values = zip(*series, strict=True)
        axes.plot(steps, values, color=color, label=label, marker=marker, markersize=4)
