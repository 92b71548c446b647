"""Emergence-promoting initialisation: smaller weights before the middle of a model, larger ones behind it.

Source: Li, George, Silva, "Advancing Neural Network Performance through Emergence-Promoting Initialization Scheme",
arXiv 2407.19044.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from nio_hf.baselines.options import check_options, is_positive
from nio_hf.baselines.tensors import LayerWeight, layer_weights
from nio_hf.core import Collective, InitResult, NIOConfig
from nio_hf.core.differentiator import LossFn
from nio_hf.core.method import SINGLE_PROCESS, Learned, OnIteration, Workspace, run_method


def emergence(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    config: NIOConfig | None = None,
    *,
    holdout: Sequence[Any] | None = None,
    on_iteration: OnIteration | None = None,
    collective: Collective = SINGLE_PROCESS,
    alpha: float = 1.1,
) -> InitResult:
    """Divide the weights of the n-th layer before the middle by alpha^n, multiply those of the n-th behind it.

        W_{-n} <- W_{-n} / alpha^n        W_n <- W_n alpha^n        n = 1, 2, ... counted from the middle outwards

    Of an odd number of layers the one in the middle keeps its weights. The product of all factors is 1, so a chain of
    layers without biases whose nonlinearity is positively homogeneous (ReLU) computes the same function as before.

    What counts as a layer is our reading: the innermost block ([`TensorPlace`] `depth`) that weights of linear,
    convolution and attention layers lie in, together with what is in front of the first block and what is behind the
    last one. In a Transformer that is a whole block: its projections work side by side or on branches of one residual
    stream, and the signal passes through the model block by block, which is the depth that the paper counts. In a
    chain of layers each of them is a block. In a model without blocks each weight counts as a layer, in parameter
    order. Biases, normalisation layers and embeddings are left alone.

    Args:
        model: as in [`initialize`], and likewise what follows.
        batches: see there; only the held-out ones are used.
        loss_fn: see there.
        config: `sub_batches`, `holdout_batches` and how to compute are used.
        holdout: see there.
        on_iteration: never called.
        collective: see there.
        alpha: above 1 to promote emergence; 1 leaves the model as it is. The default is our choice.

    Raises:
        ConfigError: for an alpha that is not above 0.
        ModelError: for a model without linear or convolution layers.
        NIOError: as in [`initialize`].
    """
    check_options("emergence", ("alpha", alpha, is_positive(alpha), "Give a finite number above 0, such as 1.1"))

    def learn(workspace: Workspace) -> Learned:
        layers = _layers(layer_weights(workspace.model, workspace.scales))
        for exponent, layer in zip(exponents(len(layers)), layers, strict=True):
            for weight in layer:
                weight.parameter.data.mul_(float(alpha) ** exponent)
        return Learned()

    return run_method(
        "emergence",
        learn,
        model,
        batches,
        loss_fn,
        config,
        iterations=0,
        holdout=holdout,
        on_iteration=on_iteration,
        collective=collective,
        options={"alpha": alpha},
    )


def exponents(layers: int) -> list[int]:
    """Exponent of alpha for each of a number of layers: -2, -1, 1, 2 for four, -2, -1, 0, 1, 2 for five."""
    half = layers // 2
    return [*range(-half, 0), *([0] * (layers % 2)), *range(1, half + 1)]


def _layers(weights: Sequence[LayerWeight]) -> list[list[LayerWeight]]:
    """The weights by layer, from input to output."""
    by_depth = sorted(weights, key=lambda weight: weight.place.depth)
    layers = [list(group) for _, group in itertools.groupby(by_depth, key=lambda weight: weight.place.depth)]
    return [[weight] for weight in weights] if len(layers) == 1 else layers
