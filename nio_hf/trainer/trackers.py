"""NIO in the trackers that Trainer reports to: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

from nio_hf.core.config import is_number
from nio_hf.core.result import InitResult
from nio_hf.extras import missing_modules
from nio_hf.report import plot_history, plot_scales
from nio_hf.report.tables import markdown_table, scale_table

if TYPE_CHECKING:
    from PIL import Image

_CURVES = ("grad_cosine", "grad_norm", "loss", "objective")
_PREFIX = "nio"


def report_to_tracker(callback: TrainerCallback, result: InitResult) -> None:
    """Report NIO to a tracker whose run is open; what is no tracker is passed over.

    What was measured stands under `nio/` against the iteration, the scales as a table and the plots as images at the
    last one.
    """
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        _to_tensorboard(callback.tb_writer, result)
    elif isinstance(callback, WandbCallback) and callback._wandb is not None and callback._wandb.run is not None:
        _to_wandb(callback._wandb, result)
    elif isinstance(callback, MLflowCallback) and callback._ml_flow.active_run() is not None:
        _to_mlflow(callback._ml_flow, result)


def _to_tensorboard(writer: Any, result: InitResult) -> None:
    for iteration, values in _curves(result):
        for name, value in values.items():
            writer.add_scalar(name, value, iteration)
    last = len(result.history)
    table = scale_table(result)
    writer.add_text(f"{_PREFIX}/scales", markdown_table(table.columns, table.rows), last)
    for name, image in _images(result):
        writer.add_image(name, np.asarray(image), last, dataformats="HWC")


def _to_wandb(wandb: Any, result: InitResult) -> None:
    axis = f"{_PREFIX}/iteration"
    wandb.define_metric(axis)
    wandb.define_metric(f"{_PREFIX}/*", step_metric=axis)
    for iteration, values in _curves(result):
        wandb.log({axis: iteration, **values})
    table = scale_table(result)
    media = {name: wandb.Image(image) for name, image in _images(result)}
    media[f"{_PREFIX}/scales"] = wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])
    wandb.log({axis: len(result.history), **media})


def _to_mlflow(mlflow: Any, result: InitResult) -> None:
    for iteration, values in _curves(result):
        mlflow.log_metrics(values, step=iteration)
    mlflow.log_dict({group.name: group.omega for group in result.groups}, f"{_PREFIX}/scales.json")
    for name, image in _images(result):
        mlflow.log_image(image, f"{name}.png")


def _curves(result: InitResult) -> Iterator[tuple[int, dict[str, float]]]:
    """(iteration, {name: value}) of what was measured; values that are not finite are left out."""
    for record in result.history:
        values = {f"{_PREFIX}/{name}": getattr(record, name) for name in _CURVES}
        yield record.iteration, {name: value for name, value in values.items() if is_number(value)}


def _images(result: InitResult) -> Iterator[tuple[str, Image.Image]]:
    """(name, plot); none without the extra `report`."""
    if missing_modules("report"):
        return
    from PIL import Image

    plots = [("history_plot", plot_history), ("scales_plot", plot_scales)]
    for name, draw in plots if result.history else plots[1:]:
        file = io.BytesIO()
        draw(result, file)
        yield f"{_PREFIX}/{name}", Image.open(file).convert("RGB")
