"""The HTML page of a run."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nio_hf.core.result import InitResult, Status
from nio_hf.errors import OutputError, Problem, one_line
from nio_hf.files import write_atomically
from nio_hf.report import tables
from nio_hf.report.history import plot_history
from nio_hf.report.plots import plot_inspection, plot_scales, plot_training
from nio_hf.report.run import Run
from nio_hf.report.style import Target
from nio_hf.report.templating import render

_CSS_PIXELS_PER_INCH = 96
_DRAWN = ("loss", "eval_loss", "eval_accuracy")
"""Quantities of a log that `plot_training` draws."""
_TONES: dict[Status, tuple[str, str]] = {
    "improved": ("good", "✓"),
    "applied": ("neutral", "="),
    "changed": ("neutral", "="),
    "unchanged": ("neutral", "="),
    "worsened": ("warning", "!"),
    "constraint_violated": ("warning", "!"),
    "data_exhausted": ("warning", "!"),
    "collapse_suspected": ("bad", "✕"),
}
"""{status: (class in the style sheet, sign)}."""


def render_page(run: Run) -> str:
    """Return the HTML page of a run, which loads nothing from elsewhere.

    Args:
        run: Run; a part that is missing leaves its section out.
    """
    result, inspection = run.result, run.inspection
    logged = [entry[key] for entry in run.log_history for key in _DRAWN if key in entry]
    return render(
        "report.html.j2",
        run=run,
        result=result,
        inspection=inspection,
        tables=tables,
        facts=_facts(run),
        summary=tables.summary_rows(result, run.metrics),
        tone=None if result is None else _TONES[result.status],
        nio_facts=() if result is None else _nio_facts(result),
        history_plot=_draw_image(plot_history, result) if result is not None and result.history else None,
        scales_plot=_draw_image(plot_scales, result) if result is not None and result.tensors else None,
        settings={} if result is None else {**dataclasses.asdict(result.config), **result.options},
        training_plot=_draw_image(plot_training, run.log_history) if logged else None,
        not_finite=sum(not math.isfinite(value) for value in logged),
        metrics={name: _readable(name, value) for name, value in run.metrics.items()},
        inspection_plot=_draw_image(plot_inspection, inspection)
        if inspection is not None and inspection.layers
        else None,
    )


def write_page(run: Run, path: Path) -> None:
    """Write the page of a run. If this fails at any moment, the file keeps its former content.

    Args:
        run: Run, as in [`render_page`].
        path: HTML file, whose folder is created.

    Raises:
        OutputError: A file that cannot be written.
    """
    # The name of a folder may hold characters that UTF-8 lacks.
    page = render_page(run).encode("utf-8", errors="xmlcharrefreplace").decode("utf-8")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
    except OSError as error:
        raise OutputError(Problem(str(path), one_line(error), "Free space or choose another --output")) from error


def _facts(run: Run) -> dict[str, str]:
    facts = run.facts
    named = {"configuration": facts.dataset_config, "evaluated on": facts.dataset_split}
    details = ", ".join(f"{what} {name}" for what, name in named.items() if name)
    known = {
        "Model": f"{facts.model} ({facts.model_type})" if facts.model_type else facts.model,
        "Parameters": f"{facts.parameters:,}" if facts.parameters else None,
        "Classes": f"{facts.classes:,}" if facts.classes else None,
        "Data set": (f"{facts.dataset} ({details})" if details else facts.dataset) if facts.dataset else None,
        "Device": f"{facts.device}, {facts.processes} process{'es' if facts.processes > 1 else ''}",
        "Recipe": facts.recipe,
        "Started from": facts.started_from,
    }
    return {name: value for name, value in known.items() if value}


def _nio_facts(result: InitResult) -> dict[str, str]:
    batches = len(result.before.parts) or 1
    return {
        "Iterations": f"{len(result.history):,}",
        "Scaled tensors": f"{len(result.tensors):,}",
        "Groups that share a scale": f"{len(result.groups):,}",
        "Reported on": f"{batches} batch{'es' if batches > 1 else ''} of {result.before.batch_size} samples",
        "Peak memory": f"{result.peak_memory / 2**30:.2f} GiB",
    }


def _readable(name: str, value: float) -> str:
    """Return a metric as text: accuracies in %, times in seconds, small numbers with four significant digits."""
    if name.endswith("accuracy"):
        return f"{value:.2%}"
    if not math.isfinite(value):
        return f"{value}"
    is_whole = float(value).is_integer() or abs(value) >= 1000
    text = f"{value:,.0f}" if is_whole else f"{value:#.4g}"
    return f"{text} s" if name.endswith(("_runtime", "_time")) else text


def _draw_image(draw: Callable[[Any, Target], object], what: Any) -> dict[str, Any]:
    """Return a plot as a data URI, with its width and height in CSS pixels at the size of its text."""
    from PIL import Image

    target = io.BytesIO()
    draw(what, target)
    with Image.open(target) as image:
        scale = _CSS_PIXELS_PER_INCH / float(image.info["dpi"][0])
        width, height = (round(scale * pixels) for pixels in image.size)
    uri = f"data:image/png;base64,{base64.b64encode(target.getvalue()).decode()}"
    return {"uri": uri, "width": width, "height": height}
