"""NIO in the trackers that Trainer reports to: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

from nio_hf.core.result import NIOResult
from nio_hf.report import plot_history, plot_scales

_CURVES = ("grad_cosine", "grad_norm", "loss", "objective")
_PREFIX = "nio"


def report_to_tracker(callback: TrainerCallback, result: NIOResult) -> None:
    """Report NIO to a tracker whose run is open; what is no tracker is passed over.

    Curves stand under `nio/` against the NIO iteration, the learned scales as a histogram and the plots as images at
    the last one.
    """
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        _to_tensorboard(callback.tb_writer, result)
    elif isinstance(callback, WandbCallback) and callback._wandb is not None and callback._wandb.run is not None:
        _to_wandb(callback._wandb, result)
    elif isinstance(callback, MLflowCallback) and callback._ml_flow.active_run() is not None:
        _to_mlflow(callback._ml_flow, result)


def _to_tensorboard(writer: Any, result: NIOResult) -> None:
    for iteration, values in _curves(result):
        for name, value in values.items():
            writer.add_scalar(name, value, iteration)
    last = len(result.history)
    writer.add_histogram(f"{_PREFIX}/scales", _scales(result), last)
    for name, image in _images(result):
        writer.add_image(name, np.asarray(image), last, dataformats="HWC")


def _to_wandb(wandb: Any, result: NIOResult) -> None:
    axis = f"{_PREFIX}/iteration"
    wandb.define_metric(axis)
    wandb.define_metric(f"{_PREFIX}/*", step_metric=axis)
    for iteration, values in _curves(result):
        wandb.log({axis: iteration, **values})
    media = {name: wandb.Image(image) for name, image in _images(result)}
    wandb.log({axis: len(result.history), f"{_PREFIX}/scales": wandb.Histogram(_scales(result)), **media})


def _to_mlflow(mlflow: Any, result: NIOResult) -> None:
    for iteration, values in _curves(result):
        mlflow.log_metrics(values, step=iteration)
    # MLflow has no histograms: each tensor's scale, in parameter order.
    mlflow.log_dict({"scales": _scales(result).tolist()}, f"{_PREFIX}/scales.json")
    for name, image in _images(result):
        mlflow.log_image(image, f"{name}.png")


def _curves(result: NIOResult) -> Iterator[tuple[int, dict[str, float]]]:
    for record in result.history:
        values = {f"{_PREFIX}/{name}": getattr(record, name) for name in _CURVES}
        yield record.iteration, {name: value for name, value in values.items() if value is not None}


def _scales(result: NIOResult) -> Any:
    return np.asarray([tensor.omega for tensor in result.tensors])


def _images(result: NIOResult) -> Iterator[tuple[str, Image.Image]]:
    plots = [("history_plot", plot_history), ("scales_plot", plot_scales)]
    for name, draw in plots if result.history else plots[1:]:
        file = io.BytesIO()
        draw(result, file)
        yield f"{_PREFIX}/{name}", Image.open(file).convert("RGB")
