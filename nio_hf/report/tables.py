"""The tables of a run, as rows of text."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from nio_hf.core.layerwise import GradientInspection, LayerGradient
from nio_hf.core.result import GradCosine, InitResult
from nio_hf.report.run import Run
from nio_hf.report.style import kind_order

_ACCURACIES = {
    "eval_accuracy": "Evaluation accuracy",
    "eval_top5_accuracy": "Evaluation accuracy, top 5",
    "eval_ema_accuracy": "Evaluation accuracy, averaged weights",
}

SummaryRow = tuple[str, str, str]
LayerRow = tuple[str, str, str, str, str, str]
MOST_GROUPS = 12
"""Groups that are shown one by one; tensors of more groups are shown by their kind."""
_GROUP_COLUMNS = ("group", "tensors", "parameters", "scale")
_KIND_COLUMNS = ("kind", "tensors", "parameters", "smallest", "median", "largest")
_LOSSES = {
    "eval_loss": "Evaluation loss",
    "eval_perplexity": "Evaluation perplexity",
    "eval_bits_per_byte": "Evaluation bits per byte",
}
LAYER_COLUMNS: LayerRow = ("", "parameters", "gradient norm", "share", "agreement", "contribution")
_SMALL_SHARE = 0.001
_BAR = r"\|"


def summary_rows(result: InitResult | None, metrics: Mapping[str, float]) -> list[SummaryRow]:
    """The summary table of a run, as (quantity, before, after).

    Args:
        result: of the initialisation; None where there was none.
        metrics: of the Trainer; used are accuracies, losses and what follows from them, and
            `train_runtime`.

    Returns:
        One row per quantity that is known. What exists only after the run has an empty `before`.
    """
    rows = [] if result is None else initialisation_rows(result)
    rows += [(name, "", f"{metrics[key]:.2%}") for key, name in _ACCURACIES.items() if key in metrics]
    rows += [(name, "", f"{metrics[key]:.4f}") for key, name in _LOSSES.items() if key in metrics]
    if result is not None:
        rows.append((f"Cost of {result.title} in training steps", "", f"{result.cost:,.1f}"))
        if result.race is not None:
            rows.append(("Training steps of the race", "", f"{result.race.cost:,}"))
        rows.append((f"Seconds of {result.title}", "", f"{result.seconds:.1f}"))
    if "train_runtime" in metrics:
        rows.append(("Seconds of training", "", f"{metrics['train_runtime']:.1f}"))
    return rows


def initialisation_rows(result: InitResult) -> list[SummaryRow]:
    """What a method changed on the report batches, as (quantity, before, after)."""
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


@dataclasses.dataclass(frozen=True)
class ScaleTable:
    """The scales of a run as a table of text.

    Attributes:
        caption: what a row is.
        columns: their names.
        rows: one for each group, or for each kind of tensors.
    """

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def scale_table(result: InitResult) -> ScaleTable:
    """The scales by group; for more than `MOST_GROUPS` groups by kind of tensors."""
    if len(result.groups) > MOST_GROUPS:
        return ScaleTable(
            f"Scales of {len(result.groups)} groups by kind of tensors", _KIND_COLUMNS, _kind_rows(result)
        )
    rows: list[tuple[str, ...]] = [
        (group.name, f"{group.tensors:,}", f"{group.parameters:,}", f"{group.omega:#.4g}") for group in result.groups
    ]
    return ScaleTable("Scale of each group of tensors", _GROUP_COLUMNS, rows)


def _kind_rows(result: InitResult) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for kind in sorted({tensor.kind for tensor in result.tensors}, key=kind_order):
        members = [tensor for tensor in result.tensors if tensor.kind == kind]
        scales = [tensor.omega for tensor in members]
        parameters = sum(math.prod(tensor.shape) for tensor in members)
        middle = statistics.median(scales)
        rows.append(
            (kind, f"{len(members)}", f"{parameters:,}", f"{min(scales):#.4g}", f"{middle:#.4g}", f"{max(scales):#.4g}")
        )
    return rows


def cost_text(run: Run, result: InitResult) -> str:
    """What an initialisation cost, as a sentence."""
    title, share = result.title, run.nio_share
    part = "" if share is None else f", {share:.1%} of the time of {title} and training together"
    steps = f"{result.cost:,.1f} training steps of {result.before.batch_size} samples"
    raced = "" if result.race is None else f" and {result.race.cost:,} steps of the training for the race"
    took = f"the arithmetic of {steps}, its reports included,{raced}"
    return f"{title} took {took} in {result.seconds:,.1f} seconds{part}."


def excluded_text(result: InitResult) -> str:
    """What is not scaled and why, as a sentence; empty where all is."""
    reasons = [tensor.reason for tensor in result.excluded]
    meanings = {
        "zero": "all zero",
        "unused": "without a gradient",
        "vector": "that are vectors",
        "no group": "in no group",
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
    return "\n".join(f"| {' | '.join(cell.replace('|', _BAR) for cell in line)} |" for line in lines)
