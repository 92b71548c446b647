"""The weights of linear, convolution and attention layers, and the gradient over other tensors than NIO's."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

from torch import nn

from nio_hf.core.scales import LayerScales, TensorPlace
from nio_hf.errors import ModelError, Problem

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerWeight:
    """A weight of two or more dimensions with the modules that own it.

    Attributes:
        place: the parameter, its name, kind and depth.
        owners: the modules; several where it is tied.
    """

    place: TensorPlace
    owners: tuple[nn.Module, ...]

    @property
    def parameter(self) -> nn.Parameter:
        """The weight."""
        return self.place.parameter

    @property
    def fan_in(self) -> int:
        """Number of inputs that one output is a sum over.

        Layers keep outputs along dimension 0. Transposed convolutions do not, nor do layers whose bias is as long as
        the last of two dimensions (GPT-2's Conv1D); the stride of transposed convolutions is not counted.
        """
        weight, owner = self.parameter, self.owners[0]
        if isinstance(owner, _TRANSPOSED):
            return weight.shape[0] // owner.groups * math.prod(weight.shape[2:])
        bias = getattr(owner, "bias", None)
        if weight.ndim == 2 and isinstance(bias, nn.Parameter) and bias.shape[0] == weight.shape[1]:
            return weight.shape[0]
        return weight.numel() // weight.shape[0]


def layer_weights(model: nn.Module, scales: LayerScales) -> list[LayerWeight]:
    """The scaled weights of linear, convolution and attention layers, in parameter order.

    A weight that is tied to an embedding is none of them: changing it would change the inputs as well.

    Raises:
        ModelError: for a model without such a weight.
    """
    scaled = {id(parameter) for parameter in scales.scaled}
    modules = list(model.modules())
    found = []
    for place in scales.gradient_places():
        if id(place.parameter) not in scaled or place.parameter.ndim < 2 or place.kind.startswith("norm"):
            continue
        owners = tuple(m for m in modules if any(p is place.parameter for p in m.parameters(recurse=False)))
        if not any(isinstance(owner, nn.Embedding) for owner in owners):
            found.append(LayerWeight(place, owners))
    if not found:
        fix = "Give a model with a trainable linear or convolution layer that is not tied to an embedding"
        raise ModelError(Problem(type(model).__name__, "no layer has a weight to initialise", fix))
    return found


@contextlib.contextmanager
def gradient_over(scales: LayerScales, tensors: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let all that reads the gradient tensors of a run read others for a while, of which each is trainable."""
    own = scales.gradient
    scales.gradient = list(tensors)
    try:
        yield
    finally:
        scales.gradient = own
