"""Plots and the summary table of a run."""

from __future__ import annotations

import collections
import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nio_hf.core.result import GradCosine, NIOResult, TensorScale
from nio_hf.errors import OutputError, Problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which people with any form of colour blindness can tell apart.
_ORANGE, _SKY, _GREEN, _BLUE, _VERMILLION, _PURPLE = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
_DARK, _GREY = "#333333", "#999999"

_LAYER_STYLES = {
    "linear": (_BLUE, "o"),
    "convolution": (_ORANGE, "s"),
    "norm": (_GREEN, "^"),
    "embedding": (_VERMILLION, "D"),
    "parameter": (_PURPLE, "P"),
}
_OTHER_STYLE = (_GREY, "X")

_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 9,
    "grid.alpha": 0.6,
    "grid.color": "#DDDDDD",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markeredgewidth": 1.1,
    "savefig.dpi": 160,
}
_BLOCK_WIDTH = 0.8
_MAX_BLOCK_LABELS = 30
_FEW_POINTS = 30
_FINE_TICKS_UP_TO = 3.0
_ROUND_STEPS = (1, 2, 5, 10)

_ACCURACIES = {
    "eval_accuracy": "Evaluation accuracy",
    "eval_top5_accuracy": "Evaluation accuracy, top 5",
    "eval_ema_accuracy": "Evaluation accuracy, averaged weights",
}

SummaryRow = tuple[str, str, str]


def plot_scales(result: NIOResult, path: Path) -> Path:
    """Draw the learned scale of each tensor against the depth of its block, by kind.

    Filled markers are weights, open ones biases. The y axis is logarithmic and symmetric around 1, so that a scale
    and its inverse are equally far from the line.

    Args:
        result: of `initialize`.
        path: PNG file to write; its folder is made.

    Returns:
        `path`.

    Raises:
        OutputError: where the file cannot be written.
    """
    blocks = sorted({tensor.depth for tensor in result.tensors})
    with _figure(path, width=min(max(6.5, 0.34 * len(blocks) + 2), 16), height=4.4) as figure:
        axes = figure.subplots()
        for kind, points in _place(result.tensors).items():
            positions, scales = zip(*points, strict=True)
            axes.plot(positions, scales, linestyle="none", label=kind, **_marker(kind))
        axes.axhline(1, color=_DARK, linewidth=0.8, zorder=1)
        _symmetric_log_scale(axes, [tensor.omega for tensor in result.tensors])
        _mark_blocks(axes, blocks)
        axes.set_ylabel("learned scale (omega)")
        axes.set_title(f"Scales learned by NIO: {len(result.tensors)} tensors, {len(result.history)} iterations")
        _legend_below(figure, axes)
    return path


def plot_history(result: NIOResult, path: Path) -> Path:
    """Draw GradCosine, gradient norm and loss by iteration, with the held-out values before and after.

    The curves are measured on the batches that NIO optimises on, at its overlap; the held-out values are at overlap
    0, with one standard error over the held-out batches.

    Args:
        result: of `initialize`.
        path: PNG file to write; its folder is made.

    Returns:
        `path`.

    Raises:
        OutputError: where the file cannot be written.
    """
    with _figure(path, width=7, height=7.5) as figure:
        cosine, norm, loss = figure.subplots(3, sharex=True)
        _draw_quantity(cosine, result, "grad_cosine", lambda measured: measured.value)
        _draw_quantity(norm, result, "grad_norm", lambda measured: measured.grad_norm)
        _draw_quantity(loss, result, "loss", lambda measured: measured.loss)
        _draw_constraint(norm, result)
        cosine.set_title(
            f"NIO on batches with {_shape_of_sub_batches(result.before)}, overlap {result.config.overlap:g}"
        )
        cosine.set_ylabel("GradCosine")
        norm.set_ylabel("gradient norm")
        loss.set_ylabel("loss")
        loss.set_xlabel("NIO iteration")
        _integer_ticks(loss)
        figure.align_ylabels()
        _legend_below(figure, cosine, norm, columns=2)
    return path


def plot_training(log_history: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw training loss, evaluation loss and evaluation accuracy by step.

    Args:
        log_history: of [`~transformers.TrainerState`]; entries without these quantities are passed over.
        path: PNG file to write; its folder is made.

    Returns:
        `path`.

    Raises:
        OutputError: where the file cannot be written.
    """
    training, evaluation, accuracy = (_series(log_history, key) for key in ("loss", "eval_loss", "eval_accuracy"))
    with _figure(path, width=7, height=5.5 if accuracy else 3.8) as figure:
        panels = figure.subplots(1 + bool(accuracy), sharex=True, squeeze=False)[:, 0]
        _draw_series(
            panels[0], training, color=_BLUE, label="training", marker="." if len(training) < _FEW_POINTS else ""
        )
        _draw_series(panels[0], evaluation, color=_VERMILLION, label="evaluation", marker="o")
        panels[0].set_ylabel("loss")
        panels[0].set_title("Training")
        if accuracy:
            percent = [(step, 100 * value) for step, value in accuracy]
            _draw_series(panels[1], percent, color=_VERMILLION, label="evaluation", marker="o")
            panels[1].set_ylabel("accuracy (%)")
        if not (training or evaluation):
            panels[0].set_title("Training: no loss was logged, lower logging_steps to see it")
        panels[-1].set_xlabel("training step")
        _integer_ticks(panels[-1])
        figure.align_ylabels()
        _legend_below(figure, *panels)
    return path


def summary_rows(result: NIOResult | None, metrics: Mapping[str, float]) -> list[SummaryRow]:
    """The summary table of a run, as (quantity, before, after).

    Args:
        result: of NIO; None where it did not run.
        metrics: of the Trainer; used are `eval_accuracy`, `eval_top5_accuracy`, `eval_ema_accuracy`, `eval_loss` and
            `train_runtime`.

    Returns:
        One row per quantity that is known. What exists only after the run has an empty `before`.
    """
    rows = [] if result is None else _initialisation_rows(result)
    rows += [(name, "", f"{metrics[key]:.2%}") for key, name in _ACCURACIES.items() if key in metrics]
    if "eval_loss" in metrics:
        rows.append(("Evaluation loss", "", f"{metrics['eval_loss']:.4f}"))
    if result is not None:
        rows.append(("Seconds of NIO", "", f"{result.seconds:.1f}"))
    if "train_runtime" in metrics:
        rows.append(("Seconds of training", "", f"{metrics['train_runtime']:.1f}"))
    return rows


def _initialisation_rows(result: NIOResult) -> list[SummaryRow]:
    before, after = result.before, result.after
    return [
        (f"GradCosine ({_shape_of_sub_batches(before)})", _cosine_with_error(before), _cosine_with_error(after)),
        ("Gradient norm", f"{before.grad_norm:.4g}", f"{after.grad_norm:.4g}"),
        ("Loss at init", f"{before.loss:.4f}", f"{after.loss:.4f}"),
    ]


def _cosine_with_error(measured: GradCosine) -> str:
    error = measured.standard_error
    return f"{measured.value:.4f} ± {error:.4f}" if math.isfinite(error) else f"{measured.value:.4f}"


def _shape_of_sub_batches(measured: GradCosine) -> str:
    per_sub_batch = measured.batch_size / measured.sub_batches
    return f"D = {measured.sub_batches}, B/D = {per_sub_batch:.4g}"


@contextlib.contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure in one style, written when the block ends. It needs no display and touches no global figure."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, format="png")
        except OSError as error:
            raise OutputError(Problem(str(path), str(error), "Free space or choose another output_dir")) from error


def _place(tensors: Sequence[TensorScale]) -> dict[str, list[tuple[float, float]]]:
    """(x, omega) of each tensor by kind: the tensors of a block stand side by side, grouped by kind."""
    blocks = collections.defaultdict(list)
    for tensor in tensors:
        blocks[tensor.depth].append(tensor)
    points = collections.defaultdict(list)
    for depth, members in blocks.items():
        for position, tensor in enumerate(sorted(members, key=_kind_order)):
            offset = _BLOCK_WIDTH * ((position + 0.5) / len(members) - 0.5)
            points[tensor.kind].append((depth + offset, tensor.omega))
    return {tensor.kind: points[tensor.kind] for tensor in sorted(tensors, key=_kind_order)}


def _kind_order(tensor: TensorScale) -> tuple[int, str, bool]:
    layer = tensor.kind.split()[0]
    known = list(_LAYER_STYLES)
    return (known.index(layer) if layer in known else len(known), layer, _is_bias(tensor.kind))


def _is_bias(kind: str) -> bool:
    return kind.endswith("bias")


def _marker(kind: str) -> dict[str, Any]:
    color, marker = _LAYER_STYLES.get(kind.split()[0], _OTHER_STYLE)
    return {
        "marker": marker,
        "markersize": 5,
        "markeredgecolor": color,
        "markerfacecolor": "white" if _is_bias(kind) else color,
    }


def _symmetric_log_scale(axes: Axes, scales: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    axes.set_yscale("log")
    reach = max((abs(math.log(scale)) for scale in scales), default=0.0)
    limit = math.exp(max(1.12 * reach, 0.02))
    axes.set_ylim(1 / limit, limit)
    fine = limit < _FINE_TICKS_UP_TO
    axes.yaxis.set_major_locator(MaxNLocator(9, steps=_ROUND_STEPS) if fine else LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _mark_blocks(axes: Axes, blocks: Sequence[int]) -> None:
    """Name the blocks on the x axis and shade every other one."""
    every = math.ceil(len(blocks) / _MAX_BLOCK_LABELS)
    axes.set_xticks(blocks[::every])
    axes.set_xlim(min(blocks) - 0.6, max(blocks) + 0.6)
    axes.grid(visible=False, axis="x")
    for block in blocks[1::2]:
        axes.axvspan(block - 0.5, block + 0.5, color="#F4F4F4", linewidth=0, zorder=0)
    axes.set_xlabel("block, by depth (0: before the first)")


def _draw_quantity(axes: Axes, result: NIOResult, field: str, measure: Callable[[GradCosine], float]) -> None:
    iterations = [record.iteration for record in result.history]
    values = [getattr(record, field) for record in result.history]
    axes.plot(iterations, values, color=_BLUE, label="NIO batches")
    held_out = {"before": (0, result.before), "after": (len(result.history) + 1, result.after)}
    for (when, (position, measured)), face in zip(held_out.items(), ("white", _DARK), strict=True):
        axes.errorbar(
            position,
            measure(measured),
            yerr=_error_over_batches(measured, measure),
            color=_DARK,
            linestyle="none",
            marker="o",
            markersize=5,
            markerfacecolor=face,
            capsize=3,
            zorder=3,
            label=f"held-out {when} (overlap 0, ± standard error)",
        )


def _error_over_batches(measured: GradCosine, measure: Callable[[GradCosine], float]) -> float | None:
    values = [measure(part) for part in measured.parts]
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _draw_constraint(axes: Axes, result: NIOResult) -> None:
    """Draw gamma, and a rug of the iterations that lowered the gradient norm instead of the objective."""
    if result.gamma is not None:
        axes.axhline(result.gamma, color=_VERMILLION, linestyle="--", label=f"gamma = {result.gamma:.4g}")
    constrained = [record.iteration for record in result.history if record.branch == "constraint"]
    if constrained:
        axes.plot(
            constrained,
            [1.0] * len(constrained),
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            color=_VERMILLION,
            linestyle="none",
            marker="|",
            markersize=8,
            label=f"constraint steps ({len(constrained)} of {len(result.history)})",
        )


def _series(log_history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in log_history if key in entry]


def _draw_series(axes: Axes, series: Sequence[tuple[int, float]], color: str, label: str, marker: str) -> None:
    if series:
        steps, values = zip(*series, strict=True)
        axes.plot(steps, values, color=color, label=label, marker=marker, markersize=4)


def _integer_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=_ROUND_STEPS))


def _legend_below(figure: Figure, *panels: Axes, columns: int = 3) -> None:
    """One legend under all panels, each label once."""
    entries: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        entries = dict(zip(labels, handles, strict=True)) | entries
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
