"""Xavier initialisation of a Transformer, as the JAX code of ViT has it."""

from __future__ import annotations

import math

import torch
from torch import nn

from nio_hf.baselines.attention import holds_all_projections, uniform
from nio_hf.core.layers import fan_in, layer_weights
from nio_hf.core.method import Learned, Method, Options, Watch
from nio_hf.core.problem import ScalingProblem

_CUT = 2.0
_CUT_DEVIATION = 0.87962566
"""Standard deviation of a normal distribution that is cut at two of its standard deviations."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def draw_xavier(problem: ScalingProblem, options: Options, watch: Watch) -> Learned:
    """Draw each matrix W (out, in) anew from U(-b, b), b = sqrt(6 / (in + out)).

    A weight that holds queries, keys and values (3 in, in) is three matrices. Convolutions are drawn from a normal
    distribution that is cut at two of its standard deviations and has variance 1 / fan_in. Embeddings, positions and
    tokens keep what their class has drawn, and so do biases and normalisation. The head is drawn as any matrix is: with
    the zeros that the JAX code has there, the body would have no gradient at the start. No batch is used; the seed
    decides.

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS
    2010; Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021.
    """
    generator = torch.Generator().manual_seed(problem.config.seed)
    for place, owners in layer_weights(problem.loss.model, problem.tensors).items():
        weight = place.parameter.data
        if isinstance(owners[0], _CONVOLUTIONS):
            drawn = torch.empty(weight.shape, dtype=torch.float64)
            nn.init.trunc_normal_(drawn, 0, 1, -_CUT, _CUT, generator=generator)
            weight.copy_(drawn / (_CUT_DEVIATION * math.sqrt(fan_in(weight, owners[0]))))
            continue
        rows, columns = weight.shape[-2:]
        if holds_all_projections(place.name):
            rows, columns = min(rows, columns), min(rows, columns)
        weight.copy_(uniform(weight, math.sqrt(6 / (rows + columns)), generator))
    return Learned()


XAVIER = Method(
    name="xavier",
    title="Xavier initialisation",
    describe=lambda config: "Xavier initialisation drew the matrices of all layers anew, as the JAX code of ViT does.",
    learn=draw_xavier,
)
"""Xavier initialisation."""
