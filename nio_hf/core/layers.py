"""The weights of linear, convolution and attention layers, and the factor with which they keep variances."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nio_hf.core.config import is_positive
from nio_hf.core.tensors import ModelTensors, TensorPlace
from nio_hf.errors import ModelError, Problem

_STACK = 3
_NO_STACKS = (nn.Conv1d, nn.ConvTranspose1d, nn.Bilinear)
"""Layers whose weight has three dimensions and is no stack."""
_SAME_RANGE = 0.1
"""Relative difference of a root mean square from the range of a class that is chance; our choice."""
_LARGER = 2.0
"""Root mean square, in ranges of the class, from which on a tensor was drawn larger on purpose; our choice."""
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def layer_weights(model: nn.Module, tensors: ModelTensors) -> dict[TensorPlace, tuple[nn.Module, ...]]:
    """{scaled weight of a linear, convolution or attention layer: the modules that own it}, in parameter order.

    A weight that is tied to an embedding is none of them: changing it would change the inputs as well.

    Raises:
        ModelError: A model without such a weight.
    """
    found = _layers(model, tensors)
    if not found:
        fix = "Give a model with a trainable linear or convolution layer that is not tied to an embedding"
        raise ModelError(Problem(type(model).__name__, "no layer has a weight to initialise", fix))
    return found


def preserving_factor(model: nn.Module, tensors: ModelTensors) -> float:
    """The common factor with which layers keep the variance of their inputs on average; 1 without a layer.

        factor = prod_l (1 / (rms(W_l) sqrt(fan_in_l)))^(P_l / P)        rms(W)^2 = mean of the squared entries

    over the weights W_l (P_l entries, P together) of [`layer_weights`]. Weights of variance 1 / fan_in keep variances
    (LeCun, Bottou, Orr, Müller, "Efficient BackProp", 1998); that one factor cannot do so in every layer, and that it
    is their geometric mean over the entries, is our choice.

    Where most entries have the `initializer_range` of the model's config, layers with a smaller rms were drawn smaller
    on purpose, as GPT-2 draws those that lead into the residual stream. They count as if they had that range, and so
    stay as much smaller as they are.
    """
    layers = _layers(model, tensors)
    if not layers:
        return 1.0
    entries, sizes = [place.parameter.numel() for place in layers], _sizes([*layers])
    usual = _usual_range(model, entries, sizes)
    if usual is not None:
        sizes = [usual if size < (1 - _SAME_RANGE) * usual else size for size in sizes]
    logs = (
        count / sum(entries) * math.log(size * math.sqrt(fan_in(place.parameter, owners[0])))
        for count, size, (place, owners) in zip(entries, sizes, layers.items(), strict=True)
        # The norm of very small entries is 0 in fp32.
        if size > 0
    )
    return math.exp(-math.fsum(logs))


def drawn_larger(model: nn.Module, tensors: ModelTensors) -> list[str]:
    """Names of the scaled tensors that another initialisation has made larger, at least twice as large as the range.

    Mimetic initialisation, for example, has queries and keys by which a token attends to itself; made larger still, it
    attends to nothing else. Such tensors are left as they are. Additive tensors are judged together, since they are
    balanced together. There are none where most entries of the layers have not the `initializer_range` of the config.
    """
    sizes, layers = dict(zip(tensors.scaled, _sizes(tensors.scaled), strict=True)), _layers(model, tensors)
    usual = _usual_range(model, [place.parameter.numel() for place in layers], [sizes[place] for place in layers])
    if usual is None:
        return []
    larger = [place for place, size in sizes.items() if size >= _LARGER * usual]
    if any(place.kind == "additive" for place in larger):
        larger += [place for place in tensors.scaled if place.kind == "additive" and place not in larger]
    return [place.name for place in larger]


def _usual_range(model: nn.Module, entries: Sequence[int], sizes: Sequence[float]) -> float | None:
    """The `initializer_range` of the model's config, where most entries of its layers have it; otherwise None."""
    usual: Any = getattr(getattr(model, "config", None), "initializer_range", None)
    if not is_positive(usual):
        return None
    alike = [math.isclose(size, usual, rel_tol=_SAME_RANGE) for size in sizes]
    return float(usual) if 2 * sum(itertools.compress(entries, alike)) > sum(entries) else None


def _sizes(places: Sequence[TensorPlace]) -> list[float]:
    """Root mean square of each tensor."""
    norms = torch.stack(torch._foreach_norm([place.parameter.detach() for place in places])).tolist()
    return [norm / math.sqrt(place.parameter.numel()) for place, norm in zip(places, norms, strict=True)]


def fan_in(weight: Tensor, owner: nn.Module) -> float:
    """Number of inputs that one output of a layer is a sum over.

    Layers keep outputs along dimension 0. Transposed convolutions do not, nor do layers whose bias is as long as the
    last of two dimensions (GPT-2's Conv1D); the stride of transposed convolutions is not counted. Which dimension of a
    stack of matrices has the inputs is not known: it is given the geometric mean of both.
    """
    if weight.ndim == _STACK and not isinstance(owner, _NO_STACKS):
        return math.sqrt(weight.shape[1] * weight.shape[2])
    if isinstance(owner, _TRANSPOSED):
        return weight.shape[0] // owner.groups * math.prod(weight.shape[2:])
    bias = getattr(owner, "bias", None)
    if weight.ndim == 2 and isinstance(bias, nn.Parameter) and bias.shape == weight.shape[1:]:
        return weight.shape[0]
    return weight.numel() // weight.shape[0]


def _layers(model: nn.Module, tensors: ModelTensors) -> dict[TensorPlace, tuple[nn.Module, ...]]:
    owners: dict[nn.Parameter, list[nn.Module]] = collections.defaultdict(list)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter].append(module)
    return {
        place: tuple(owners[place.parameter])
        for place in tensors.scaled
        if place.kind in ("input", "trunk", "transition", "head")
        and not any(isinstance(owner, nn.Embedding) for owner in owners[place.parameter])
    }
