"""Architecture-aware initialisation: variances of the weights that follow from the graph of a network."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from nio_hf.baselines.in_degree import in_degrees
from nio_hf.core.batches import chunks
from nio_hf.core.collective import Collective
from nio_hf.core.config import is_positive
from nio_hf.core.layers import fan_in, layer_weights
from nio_hf.core.method import Learned, Method, Options, Watch
from nio_hf.core.problem import FORWARD_SHARE, ScalingProblem, parts_of
from nio_hf.core.sub_batches import located


def scale_by_in_degree(problem: ScalingProblem, options: Options, watch: Watch) -> Learned:
    """Scale each weight of a linear, convolution or attention layer to the variance gain / (fan_in d).

        W_l <- W_l sqrt(gain / (fan_in d)) / rms(W_l)        rms(W)^2 = mean of the squared entries

    d is the in-degree of the vertex that the layer leads to, so that a sum of d outputs has the variance that one
    would have: 2 where the branch of a residual block meets its skip connection, 1 where the output goes on alone. It
    is read off autograd's graph of the loss (see [`in_degrees`]), for a part of one batch. In a residual Transformer,
    our reading of a graph that the paper does not treat, the output projection of attention and the second layer of
    the feed-forward part have d = 2, all others d = 1. The identity of a skip connection has no weight and is not
    scaled. The gain of 2 belongs to ReLU, and every layer is given it, the last one too.

    Options:
        gain: 2 for ReLU, the paper's.

    Raises:
        ModelError: A model without linear or convolution layers.

    Source: Chen, Wu, Wang, Hanin, "Principled Architecture-aware Scaling of Hyperparameters", ICLR 2024,
    arXiv 2402.17440.
    """
    layers = layer_weights(problem.loss.model, problem.tensors)
    with problem.collective.together():
        degrees = _degrees(problem, [place.parameter for place in layers])
        for (place, owners), degree in zip(layers.items(), degrees, strict=True):
            weight, inputs = place.parameter.data, fan_in(place.parameter, owners[0])
            weight.mul_(math.sqrt(options["gain"] / (inputs * degree)) / weight.square().mean().sqrt())
    for value in problem.theta:
        problem.collective.broadcast_(value)
    return Learned(cost=FORWARD_SHARE / problem.config.sub_batches)


def _degrees(problem: ScalingProblem, weights: Sequence[nn.Parameter]) -> list[int]:
    """The in-degree of each weight, on samples that were computed at once before."""
    config, batch = problem.config, problem.stream.next()
    parts = parts_of(config, problem.loss, Collective(), batch, "the batch of the graph", 1)
    with located(parts.where):
        loss, _ = problem.loss(next(chunks(parts.owned[0], problem.micro_batch_size)), parts.seed_of(0))
        return in_degrees(loss, weights)


ARCHITECTURE_AWARE = Method(
    name="architecture_aware",
    title="architecture-aware initialisation",
    describe=lambda config: (
        "Architecture-aware initialisation (Chen et al., 2024) scaled the weights of each layer to the variance that "
        "its fan-in and its in-degree ask for."
    ),
    learn=scale_by_in_degree,
    batches=lambda config, options: 1,
    most_cost=lambda config, groups, options: FORWARD_SHARE / config.sub_batches,
    options={"gain": 2.0},
    check=lambda options: [
        ("gain", options["gain"], is_positive(options["gain"]), "Give a finite number above 0, such as 2")
    ],
)
"""Architecture-aware initialisation."""
