"""The weights of linear, convolution and attention layers."""

from __future__ import annotations

import math

from torch import nn

from nio_hf.core.tensors import ModelTensors, TensorPlace
from nio_hf.errors import ModelError, Problem

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def layer_weights(model: nn.Module, tensors: ModelTensors) -> dict[TensorPlace, tuple[nn.Module, ...]]:
    """{scaled weight of a linear, convolution or attention layer: the modules that own it}, in parameter order.

    A weight that is tied to an embedding is none of them: changing it would change the inputs as well.

    Raises:
        ModelError: for a model without such a weight.
    """
    modules = list(model.modules())
    found = {}
    for place in tensors.scaled:
        if place.kind not in ("input", "trunk", "transition", "head"):
            continue
        owners = tuple(m for m in modules if any(p is place.parameter for p in m.parameters(recurse=False)))
        if not any(isinstance(owner, nn.Embedding) for owner in owners):
            found[place] = owners
    if not found:
        fix = "Give a model with a trainable linear or convolution layer that is not tied to an embedding"
        raise ModelError(Problem(type(model).__name__, "no layer has a weight to initialise", fix))
    return found


def fan_in(weight: nn.Parameter, owner: nn.Module) -> int:
    """Number of inputs that one output of a layer is a sum over.

    Layers keep outputs along dimension 0. Transposed convolutions do not, nor do layers whose bias is as long as the
    last of two dimensions (GPT-2's Conv1D); the stride of transposed convolutions is not counted.
    """
    if isinstance(owner, _TRANSPOSED):
        return weight.shape[0] // owner.groups * math.prod(weight.shape[2:])
    bias = getattr(owner, "bias", None)
    if weight.ndim == 2 and isinstance(bias, nn.Parameter) and bias.shape[0] == weight.shape[1]:
        return weight.shape[0]
    return weight.numel() // weight.shape[0]
