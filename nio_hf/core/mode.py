"""The state a model is measured in: no randomness, exact kernels, nothing recorded; all of it restored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from nio_hf.core.config import BatchNormMode


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch normalisation layers of a model."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextlib.contextmanager
def measuring(model: nn.Module, batch_norm: BatchNormMode = "batch") -> Iterator[None]:
    """Put a model and the kernels in the state that gradients of its initialisation are measured in.

    All modules are in evaluation mode (no dropout, no stochastic depth), except batch normalisation, which uses the
    statistics of its input without recording them (`batch_norm="batch"`), and layers that checkpoint activations,
    which do so in training mode only. Attention runs on the math kernel, which has a double backward; float32
    products are not rounded to TF32, autocast is off, and compiled models run eagerly.

    Args:
        model: is left in the state that it was in.
        batch_norm: "batch", or "frozen" for running statistics (see [`frozen_statistics`]).
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_flags_restored(model))
        model.eval()
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
        if batch_norm == "batch":
            for layer in batch_norms(model):
                layer.training = True
                layer.track_running_stats = False
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_full_precision())
        stack.enter_context(torch.autocast(_device_type(model), enabled=False))
        if _is_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextlib.contextmanager
def frozen_statistics(model: nn.Module, forward: Callable[[], Any]) -> Iterator[None]:
    """Hold the running statistics of batch normalisation at those of one forward; put the former ones back.

    Args:
        model: in the state of `measuring(model, "frozen")`.
        forward: runs the model on the batch whose statistics are wanted.
    """
    layers = batch_norms(model)
    saved: list[dict[str, Tensor | None]] = []
    settings = [(layer.momentum, layer.track_running_stats) for layer in layers]
    for layer in layers:
        saved.append(dict(layer._buffers))
        reference = layer.weight if layer.weight is not None else next(model.parameters())
        layer.running_mean = reference.detach().new_zeros(layer.num_features)
        layer.running_var = reference.detach().new_ones(layer.num_features)
        layer.num_batches_tracked = None
    try:
        for layer in layers:
            layer.momentum, layer.track_running_stats, layer.training = 1.0, True, True
        with torch.no_grad():
            forward()
        for layer in layers:
            layer.training = False
        yield
    finally:
        for layer, buffers, (momentum, tracked) in zip(layers, saved, settings, strict=True):
            layer._buffers.update(buffers)
            layer.momentum, layer.track_running_stats, layer.training = momentum, tracked, False


@contextlib.contextmanager
def _flags_restored(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    tracking = [(layer, layer.track_running_stats) for layer in batch_norms(model)]
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for layer, flag in tracking:
            layer.track_running_stats = flag


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def _device_type(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def _is_compiled(model: nn.Module) -> bool:
    return any(
        module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
        for module in model.modules()
    )
