"""Emergence-promoting initialisation: smaller weights before the middle of a model, larger ones behind it."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from nio_hf.core.config import is_positive
from nio_hf.core.layers import layer_weights
from nio_hf.core.method import Learned, Method, Options, Watch
from nio_hf.core.problem import ScalingProblem
from nio_hf.core.tensors import TensorPlace


def scale_by_depth(problem: ScalingProblem, options: Options, watch: Watch) -> Learned:
    """Divide the weights of the n-th layer before the middle by alpha^n, multiply those of the n-th behind it.

        W_{-n} <- W_{-n} / alpha^n        W_n <- W_n alpha^n        n = 1, 2, ... counted from the middle outwards

    Of an odd number of layers the one in the middle keeps its weights. The product of all factors is 1, so a chain of
    layers without biases whose nonlinearity is positively homogeneous (ReLU) computes the same function as before.

    What counts as a layer is our reading: the innermost block ([`TensorPlace`] `depth`) that weights of linear,
    convolution and attention layers lie in, together with what is in front of the first block and what is behind the
    last one. In a Transformer that is a whole block: its projections work side by side or on branches of one residual
    stream, and the signal passes through the model block by block, which is the depth that the paper counts. In a
    chain of layers each of them is a block. In a model without blocks each weight counts as a layer, in parameter
    order. Biases, normalisation layers and embeddings are left alone. No batch is used.

    Options:
        alpha: Above 1 to promote emergence; 1 leaves the model as it is. The default is our choice.

    Raises:
        ModelError: A model without linear or convolution layers.

    Source: Li, George, Silva, "Advancing Neural Network Performance through Emergence-Promoting Initialization Scheme",
    arXiv 2407.19044.
    """
    layers = _layers(layer_weights(problem.loss.model, problem.tensors))
    for exponent, layer in zip(exponents(len(layers)), layers, strict=True):
        for place in layer:
            place.parameter.data.mul_(float(options["alpha"]) ** exponent)
    return Learned()


def exponents(layers: int) -> list[int]:
    """Exponent of alpha for each of a number of layers: -2, -1, 1, 2 for four, -2, -1, 0, 1, 2 for five."""
    half = layers // 2
    return [*range(-half, 0), *([0] * (layers % 2)), *range(1, half + 1)]


def _layers(weights: Iterable[TensorPlace]) -> list[list[TensorPlace]]:
    """The weights by layer, from input to output."""
    by_depth: dict[int, list[TensorPlace]] = collections.defaultdict(list)
    for place in weights:
        by_depth[place.depth].append(place)
    if len(by_depth) == 1:
        return [[place] for place in weights]
    return [by_depth[depth] for depth in sorted(by_depth)]


EMERGENCE = Method(
    name="emergence",
    title="emergence-promoting initialisation",
    describe=lambda config: (
        "Emergence-promoting initialisation (Li et al., 2024) scaled the weights of each layer by powers of alpha, "
        "down before the middle layer and up behind it."
    ),
    learn=scale_by_depth,
    options={"alpha": 1.1},
    check=lambda options: [
        ("alpha", options["alpha"], is_positive(options["alpha"]), "Give a finite number above 0, such as 1.1")
    ],
)
"""Emergence-promoting initialisation."""
