"""The state a model is measured in: no randomness, exact kernels, nothing recorded; all of it restored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch normalisation layers of a model."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextlib.contextmanager
def isolated(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model as in [`measuring`], with torch's random number generators forked."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), measuring(model):
        yield


@contextlib.contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Put a model and the kernels in the state that gradients of its initialisation are measured in, and back.

    All modules are in evaluation mode (no dropout, no stochastic depth), except batch normalisation, which uses the
    statistics of its input without recording them. Layers that checkpoint activations go on to do so. Attention runs on
    the math kernel, which has a double backward; float32 products are not rounded to TF32, autocast is off, and
    compiled models run eagerly.

    Args:
        model: Model, whose state is restored at the end, buffers included.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_restored(model))
        model.eval()
        for layer in _checkpointing_layers(model):
            stack.enter_context(_checkpointing_in_evaluation(layer))
        for norm in batch_norms(model):
            norm.training = True
            norm.track_running_stats = False
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_full_precision())
        if torch.amp.is_autocast_available(_device_type(model)):
            stack.enter_context(torch.autocast(_device_type(model), enabled=False))
        if _is_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put the flags and the buffers of all modules back."""
    training = [(module, module.training) for module in model.modules()]
    tracking = [(layer, layer.track_running_stats) for layer in batch_norms(model)]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for layer, flag in tracking:
            layer.track_running_stats = flag
        with torch.no_grad():
            for module, name, buffer, saved in buffers:
                # A loss may assign another tensor, or write past the version counter, as through `data`.
                setattr(module, name, buffer)
                if not buffer.is_meta and not torch.equal(buffer, saved):
                    buffer.copy_(saved)


def _checkpointing_layers(model: nn.Module) -> list[nn.Module]:
    """The innermost modules that checkpoint activations, as the models of transformers mark them."""
    marked = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    able = [module for module in marked if hasattr(module, "_gradient_checkpointing_func")]
    return [module for module in able if not any(other in able for other in list(module.modules())[1:])]


@contextlib.contextmanager
def _checkpointing_in_evaluation(layer: nn.Module) -> Iterator[None]:
    """Let a layer checkpoint, which it does in training mode only, and compute in evaluation mode nevertheless."""
    checkpoint: Any = layer._gradient_checkpointing_func

    def checkpoint_in_evaluation(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def computed(*inner_args: Any, **inner_kwargs: Any) -> Any:
            layer.training = False
            try:
                return function(*inner_args, **inner_kwargs)
            finally:
                layer.training = True

        return checkpoint(computed, *args, **kwargs)

    layer._gradient_checkpointing_func = checkpoint_in_evaluation  # type: ignore[assignment]
    layer.training = True
    try:
        yield
    finally:
        layer._gradient_checkpointing_func = checkpoint


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Products and convolutions in the precision of their inputs, on every device."""
    backends: Any = torch.backends
    settings: list[Any] = [
        *(backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn),
        *(backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn),
    ]
    saved = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, saved, strict=True):
            setting.fp32_precision = precision


def _device_type(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def _is_compiled(model: nn.Module) -> bool:
    return any(
        module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
        for module in model.modules()
    )
