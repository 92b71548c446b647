"""The tables of a run, as rows of text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from nio_hf.core.layerwise import GradientInspection, LayerGradient
from nio_hf.core.result import GradCosine, NIOResult
from nio_hf.report.run import Run
from nio_hf.report.style import kind_order

_ACCURACIES = {
    "eval_accuracy": "Evaluation accuracy",
    "eval_top5_accuracy": "Evaluation accuracy, top 5",
    "eval_ema_accuracy": "Evaluation accuracy, averaged weights",
}

SummaryRow = tuple[str, str, str]
ScaleRow = tuple[str, str, str, str, str, str]
LayerRow = tuple[str, str, str, str, str, str]
SCALE_COLUMNS: ScaleRow = ("kind", "tensors", "parameters", "smallest", "median", "largest")
LAYER_COLUMNS: LayerRow = ("", "parameters", "gradient norm", "share", "agreement", "contribution")
_SMALL_SHARE = 0.001


def summary_rows(result: NIOResult | None, metrics: Mapping[str, float]) -> list[SummaryRow]:
    """The summary table of a run, as (quantity, before, after).

    Args:
        result: of NIO; None where it did not run.
        metrics: of the Trainer; used are `eval_accuracy`, `eval_top5_accuracy`, `eval_ema_accuracy`, `eval_loss` and
            `train_runtime`.

    Returns:
        One row per quantity that is known. What exists only after the run has an empty `before`.
    """
    rows = [] if result is None else initialisation_rows(result)
    rows += [(name, "", f"{metrics[key]:.2%}") for key, name in _ACCURACIES.items() if key in metrics]
    if "eval_loss" in metrics:
        rows.append(("Evaluation loss", "", f"{metrics['eval_loss']:.4f}"))
    if result is not None:
        rows.append((f"Seconds of {result.title}", "", f"{result.seconds:.1f}"))
    if "train_runtime" in metrics:
        rows.append(("Seconds of training", "", f"{metrics['train_runtime']:.1f}"))
    return rows


_SHARED_BY = {
    "tensor": "scalar (omega) per tensor",
    "kind": "scalar (omega) per kind of tensors",
    "model": "scalar (omega) for all of them",
}
_DESCRIPTIONS = {
    "none": "The model has the initialisation that its class gives it.",
    "gradinit": "GradInit (Zhu et al., 2021) learned one scalar per weight tensor, so that the loss after one step of "
    "the optimizer is small.",
    "metainit": "MetaInit (Dauphin and Schoenholz, 2019) learned the norm of each weight tensor, so that the gradient "
    "changes little along itself.",
    "lsuv": "LSUV (Mishkin and Matas, 2015) scaled the weights of each layer to an output variance of 1.",
    "emergence": "Emergence-promoting initialisation (Li et al., 2024) scaled the weights of each layer by powers of "
    "alpha, down before the middle layer and up behind it.",
    "architecture_aware": "Architecture-aware initialisation (Chen et al., 2024) scaled the weights of each layer to "
    "the variance that its fan-in and its in-degree ask for.",
}


def described_method(result: NIOResult) -> str:
    """What a method does, in a sentence."""
    if result.method in _DESCRIPTIONS:
        return _DESCRIPTIONS[result.method]
    bound = "" if result.gamma is None else " under a bound on their norm (gamma)"
    one = _SHARED_BY[result.config.scale_sharing]
    return (
        f"Neural Initialization Optimization (NIO) learned scales of the weights, one {one}, so that the gradients of "
        f"different sub-batches agree (GradCosine){bound}."
    )


def initialisation_rows(result: NIOResult) -> list[SummaryRow]:
    """What NIO changed on the held-out batches, as (quantity, before, after)."""
    before, after = result.before, result.after
    return [
        (f"GradCosine ({shape_of_sub_batches(before)})", cosine_with_error(before), cosine_with_error(after)),
        ("Gradient norm", f"{before.grad_norm:#.4g}", f"{after.grad_norm:#.4g}"),
        ("Loss at init", f"{before.loss:.4f}", f"{after.loss:.4f}"),
    ]


def cosine_with_error(measured: GradCosine) -> str:
    """GC, with its standard error over the batches where there are several."""
    error = measured.standard_error
    return f"{measured.value:.4f} ± {error:.4f}" if math.isfinite(error) else f"{measured.value:.4f}"


def shape_of_sub_batches(measured: GradCosine) -> str:
    """D and B / D, without which a GC cannot be compared with another."""
    per_sub_batch = measured.batch_size / measured.sub_batches
    return f"D = {measured.sub_batches}, B/D = {per_sub_batch:.4g}"


def scale_rows(result: NIOResult) -> list[ScaleRow]:
    """The learned scales by kind of tensor, as `SCALE_COLUMNS`."""
    rows = []
    for kind in sorted({tensor.kind for tensor in result.tensors}, key=kind_order):
        members = [tensor for tensor in result.tensors if tensor.kind == kind]
        scales = [tensor.omega for tensor in members]
        parameters = sum(math.prod(tensor.shape) for tensor in members)
        middle = statistics.median(scales)
        rows.append(
            (kind, f"{len(members)}", f"{parameters:,}", f"{min(scales):#.4g}", f"{middle:#.4g}", f"{max(scales):#.4g}")
        )
    return rows


def excluded_text(result: NIOResult) -> str:
    """What is not scaled and why, as a sentence; empty where all is."""
    reasons = [tensor.reason for tensor in result.excluded]
    meanings = {
        "zero": "all zero",
        "unused": "without a gradient",
        "vector": "of one dimension",
        "name": "not chosen by name",
    }
    parts = [f"{reasons.count(reason)} {meanings.get(reason, reason)}" for reason in dict.fromkeys(reasons)]
    return f"Left as they were: {', '.join(parts)}." if parts else ""


def kept_text(run: Run) -> str:
    """Which step the weights are of, as a sentence behind another one; empty where it is the last."""
    return "" if run.kept_step is None else f" The weights are those of step {run.kept_step:,}, the best evaluation."


def layer_rows(inspection: GradientInspection, by: str) -> list[LayerRow]:
    """An inspection by "kind" or "depth", as `LAYER_COLUMNS`."""
    groups = inspection.grouped(lambda layer: getattr(layer, by))
    order = sorted(groups, key=kind_order if by == "kind" else None)
    return [_layer_row(groups[key]) for key in order]


def _layer_row(group: LayerGradient) -> LayerRow:
    agreement = f"{group.agreement:.4f}" if math.isfinite(group.agreement) else "-"
    return (
        group.name,
        f"{group.parameters:,}",
        f"{group.grad_norm:#.4g}",
        f"{group.share:.1%}" if group.share >= _SMALL_SHARE or group.share == 0 else f"<{_SMALL_SHARE:.1%}",
        agreement,
        f"{group.contribution:.4f}",
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
