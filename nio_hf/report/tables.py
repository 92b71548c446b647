"""The tables of a run, as rows of text."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from nio_hf.core.layerwise import GradientInspection
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
"""Number of groups up to which each group is shown; beyond, tensors are shown by their kind."""
_LOSSES = {
    "eval_loss": "Evaluation loss",
    "eval_perplexity": "Evaluation perplexity",
    "eval_bits_per_byte": "Evaluation bits per byte",
}
LAYER_COLUMNS: LayerRow = ("", "parameters", "gradient norm", "share", "agreement", "contribution")
_SMALL_SHARE = 0.001
_BAR = r"\|"


def summary_rows(result: InitResult | None, metrics: Mapping[str, float]) -> list[SummaryRow]:
    """Return the rows (quantity, before, after) of the summary table of a run.

    Args:
        result: Result of the initialisation; None without one.
        metrics: Metrics of the Trainer, of which accuracies, losses and `train_runtime` are used.

    Returns:
        A row for each known quantity. A quantity that exists only after the run has an empty `before`.
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
    """Return the rows (quantity, before, after) of the measurements on the report batches."""
    before, after = result.before, result.after
    return [
        (f"GradCosine ({shape_of_sub_batches(before)})", cosine_with_error(before), cosine_with_error(after)),
        ("Gradient norm", f"{before.grad_norm:#.4g}", f"{after.grad_norm:#.4g}"),
        ("Loss at init", f"{before.loss:.4f}", f"{after.loss:.4f}"),
    ]


def cosine_with_error(measured: GradCosine) -> str:
    """Return GC as text, with its standard error over several batches."""
    error = measured.standard_error
    return f"{measured.value:.4f} ± {error:.4f}" if math.isfinite(error) else f"{measured.value:.4f}"


def shape_of_sub_batches(measured: GradCosine) -> str:
    """Return D and B / D as text; GC is comparable only at the same values."""
    per_sub_batch = measured.batch_size / measured.sub_batches
    return f"D = {measured.sub_batches}, B/D = {per_sub_batch:.4g}"


@dataclasses.dataclass(frozen=True)
class ScaleTable:
    """The scales of a run as a table of text.

    Attributes:
        caption: Caption, which says what a row is.
        columns: Names of the columns.
        rows: Rows, one for each group or kind of tensors.
    """

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def scale_table(result: InitResult) -> ScaleTable:
    """Return the scales by group, or by kind of tensors for more than `MOST_GROUPS` groups."""
    rows: list[tuple[str, ...]] = []
    if len(result.groups) <= MOST_GROUPS:
        columns: tuple[str, ...] = ("group", "tensors", "parameters", "scale")
        for group in result.groups:
            rows.append((group.name, f"{group.tensors:,}", f"{group.parameters:,}", f"{group.omega:#.4g}"))
        return ScaleTable("Scale of each group of tensors", columns, rows)
    columns = ("kind", "tensors", "parameters", "smallest", "median", "largest")
    for kind in sorted({tensor.kind for tensor in result.tensors}, key=kind_order):
        members = [tensor for tensor in result.tensors if tensor.kind == kind]
        scales = [tensor.omega for tensor in members]
        parameters = sum(math.prod(tensor.shape) for tensor in members)
        statistic = (f"{value:#.4g}" for value in (min(scales), statistics.median(scales), max(scales)))
        rows.append((kind, f"{len(members)}", f"{parameters:,}", *statistic))
    return ScaleTable(f"Scales of {len(result.groups)} groups by kind of tensors", columns, rows)


def cost_text(run: Run, result: InitResult) -> str:
    """Return the cost of an initialisation as a sentence."""
    title, share = result.title, run.nio_share
    part = "" if share is None else f", {share:.1%} of the time of {title} and training together"
    steps = f"{result.cost:,.1f} training steps of {result.before.batch_size} samples"
    raced = "" if result.race is None else f" and {result.race.cost:,} steps of the training for the race"
    took = f"the arithmetic of {steps}, its reports included,{raced}"
    return f"{title} took {took} in {result.seconds:,.1f} seconds{part}."


def excluded_text(result: InitResult) -> str:
    """Return the number of tensors without a scale by reason, as a sentence; empty if there are none."""
    reasons = [tensor.reason for tensor in result.excluded]
    meanings = {
        "zero": "all zero",
        "unused": "without a gradient",
        "vector": "that are vectors",
        "larger": "drawn larger on purpose",
        "no group": "in no group",
    }
    parts = [f"{reasons.count(reason)} {meanings.get(reason, reason)}" for reason in dict.fromkeys(reasons)]
    return f"Left as they were: {', '.join(parts)}." if parts else ""


def headline(run: Run) -> str:
    """Return one or two sentences that tell how far a model is trained, with the data set in backticks."""
    data = f" on `{run.facts.dataset}`" if run.facts.dataset else ""
    if not run.is_trained:
        what = "model is not trained" if run.result is None else "is an initialised checkpoint, not a trained model"
        return f"This {what}. Its predictions mean nothing yet."
    if not run.is_finished:
        return f"This training is not finished: step {run.steps:,} of {run.max_steps:,}{data}."
    steps = f"{run.steps:,}" if run.steps >= run.max_steps else f"{run.steps:,} of {run.max_steps:,}"
    steps += " step" if run.max_steps == 1 else " steps"
    start = "" if run.result is None else f", from an initialisation by {run.result.title}"
    kept = "" if run.kept_step is None else f" The weights are those of step {run.kept_step:,}, the best evaluation."
    return f"This model was trained for {steps}{data}{start}.{kept}"


def layer_rows(inspection: GradientInspection, by: str) -> list[LayerRow]:
    """Return the rows of an inspection by "kind" or "depth"; the columns are `LAYER_COLUMNS`."""
    groups = inspection.grouped(lambda layer: getattr(layer, by))
    rows: list[LayerRow] = []
    for key in sorted(groups, key=kind_order if by == "kind" else None):
        group = groups[key]
        is_small = 0 < group.share < _SMALL_SHARE
        share = f"<{_SMALL_SHARE:.1%}" if is_small else f"{group.share:.1%}"
        agreement = f"{group.agreement:.4f}" if math.isfinite(group.agreement) else "-"
        norm, contribution = f"{group.grad_norm:#.4g}", f"{group.contribution:.4f}"
        rows.append((group.name, f"{group.parameters:,}", norm, share, agreement, contribution))
    return rows


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', _BAR) for cell in line)} |" for line in lines)
