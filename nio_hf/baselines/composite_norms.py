"""Normalisation in elementary operations, for derivatives of third order.

The second derivatives that torch has of `layer_norm` and `batch_norm` cannot be differentiated once more: what they
saved of the forward counts as constant there, and third derivatives are wrong without an error (found with torch 2.13
against finite differences). Those of `group_norm` are right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class CompositeNorms(TorchFunctionMode):
    """While it is active, `torch.nn.functional` normalises by elementary operations.

    Covered are layer, RMS, instance and batch normalisation; running statistics are read and not updated.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the replacement of a function, or the function."""
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _affine(_standardised(input, list(range(-len(normalized_shape), 0)), eps), weight, bias)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    dims = list(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(input * (input.square().mean(dims, keepdim=True) + eps).rsqrt(), weight, None)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    normal = _standardised(input, list(range(2, input.ndim)), eps)
    return _affine(normal, _per_channel(weight, input), _per_channel(bias, input))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        normal = _standardised(input, [dim for dim in range(input.ndim) if dim != 1], eps)
    else:
        mean, variance = _channels(running_mean, input), _channels(running_var, input)
        normal = (input - mean) * (variance + eps).rsqrt()
    return _affine(normal, _per_channel(weight, input), _per_channel(bias, input))


def _standardised(values: Tensor, dims: list[int], eps: float) -> Tensor:
    centred = values - values.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _affine(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled = normal if weight is None else normal * weight
    return scaled if bias is None else scaled + bias


def _per_channel(parameter: Tensor | None, input: Tensor) -> Tensor | None:
    return None if parameter is None else _channels(parameter, input)


def _channels(values: Tensor, input: Tensor) -> Tensor:
    """Values of the channels, dimension 1 of the input, in a shape that goes with it."""
    return values.reshape(1, -1, *[1] * (input.ndim - 2))


_REPLACED: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    functional.instance_norm: _instance_norm,
    functional.batch_norm: _batch_norm,
}
