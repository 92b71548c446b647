"""Initialisation and learning rate that follow from the graph of a network.

Letters: d the in-degree of the vertex that a layer leads to, q the size of a convolution kernel, L_p the depth of a
path p from input to output.

Source: Chen, Wu, Wang, Hanin, "Principled Architecture-aware Scaling of Hyperparameters", ICLR 2024, arXiv 2402.17440.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from nio_hf.baselines.in_degree import in_degrees
from nio_hf.baselines.options import check_options, is_count, is_positive
from nio_hf.baselines.tensors import layer_weights
from nio_hf.core import Collective, InitResult, NIOConfig
from nio_hf.core.differentiator import LossFn
from nio_hf.core.loop import iteration_seed
from nio_hf.core.method import SINGLE_PROCESS, Learned, OnIteration, Workspace, run_method
from nio_hf.core.two_pass import located


def architecture_aware(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    config: NIOConfig | None = None,
    *,
    holdout: Sequence[Any] | None = None,
    on_iteration: OnIteration | None = None,
    collective: Collective = SINGLE_PROCESS,
    gain: float = 2.0,
) -> InitResult:
    """Scale each weight of a linear, convolution or attention layer to the variance gain / (fan_in d).

        W_l <- W_l sqrt(gain / (fan_in d)) / rms(W_l)        rms(W)^2 = mean of the squared entries

    d is the in-degree of the vertex that the layer leads to, so that a sum of d outputs has the variance that one
    would have: 2 where the branch of a residual block meets its skip connection, 1 where the output goes on alone. It
    is read off autograd's graph of the loss (see [`in_degrees`]). In a residual Transformer, our reading of a
    graph that the paper does not treat, the output projection of attention and the second layer of the feed-forward
    part have d = 2, all others d = 1. The identity of a skip connection has no weight and is not scaled. The gain of 2
    belongs to ReLU, and every layer is given it, the last one too.

    Args:
        model: as in [`initialize`], and likewise what follows.
        batches: see there; of one that is not held out a sub-batch is used, for the graph.
        loss_fn: see there.
        config: `sub_batches`, `holdout_batches` and how to compute are used.
        holdout: see there.
        on_iteration: never called.
        collective: see there.
        gain: 2 for ReLU, the paper's.

    Raises:
        ConfigError: for a gain that is not above 0.
        ModelError: for a model without linear or convolution layers.
        NIOError: as in [`initialize`].
    """
    check_options("architecture_aware", ("gain", gain, is_positive(gain), "Give a finite number above 0, such as 2"))

    def learn(workspace: Workspace) -> Learned:
        layers = layer_weights(workspace.model, workspace.scales)
        with workspace.passes.collective.together():
            degrees = _degrees(workspace, [layer.parameter for layer in layers])
            for layer, degree in zip(layers, degrees, strict=True):
                weight = layer.parameter.data
                weight.mul_(math.sqrt(gain / (layer.fan_in * degree)) / weight.square().mean().sqrt())
        for value in workspace.theta:
            workspace.passes.collective.broadcast_(value)
        return Learned()

    return run_method(
        "architecture_aware",
        learn,
        model,
        batches,
        loss_fn,
        config,
        iterations=1,
        holdout=holdout,
        on_iteration=on_iteration,
        collective=collective,
        options={"gain": gain},
    )


def maximal_learning_rate(
    base_lr: float,
    base_paths: Mapping[int, int],
    paths: Mapping[int, int],
    *,
    base_kernel: int = 1,
    kernel: int = 1,
) -> float:
    """The learning rate of a network from that of another one, tuned, by the paper's law.

        eta = c q^-1 (sum_p L_p^3)^(-1/2)        with c from the other network

    For a chain, one path of depth L, that is L^(-3/2). See [`residual_path_depths`] for residual networks.

    Args:
        base_lr: the best learning rate of the tuned network.
        base_paths: its paths, {depth: number of paths of that depth}.
        paths: those of the network that a learning rate is wanted for.
        base_kernel: q of the tuned network; 1 for linear layers.
        kernel: q of the other one.

    Returns:
        The learning rate, in the units of `base_lr`.

    Raises:
        ConfigError: lists what is out of range.
    """
    fix = "Give {depth: number of paths}, whole numbers of at least 1"
    whole = "Give a whole number of at least 1"
    check_options(
        "maximal_learning_rate",
        ("base_lr", base_lr, is_positive(base_lr), "Give a finite number above 0"),
        ("base_paths", base_paths, _are_paths(base_paths), fix),
        ("paths", paths, _are_paths(paths), fix),
        ("base_kernel", base_kernel, is_count(base_kernel), whole),
        ("kernel", kernel, is_count(kernel), whole),
    )
    return base_lr * math.sqrt(_cubes(base_paths) / _cubes(paths)) * base_kernel / kernel


def residual_path_depths(stem: int, branches: Sequence[int]) -> dict[int, int]:
    """Paths through a chain of residual blocks, {depth: number of paths}.

    Each block is passed by its branch, of so many layers, or by its skip connection, of none, so B blocks have 2^B
    paths: the coefficients of x^stem prod_b (1 + x^(depth of branch b)). For B branches of equal depth k, binom(B, j)
    paths have the depth stem + j k.

    In a Transformer, our reading, each block has two branches of two layers: attention (value and output projection;
    queries and keys only weigh the values) and the feed-forward part. `stem` counts the layers outside of blocks,
    patch embedding and classifier. A ViT of 12 blocks is `residual_path_depths(2, [2] * 24)`.

    Args:
        stem: number of layers that all paths have in common.
        branches: number of layers of each residual branch.

    Raises:
        ConfigError: lists what is out of range.
    """
    sound = isinstance(stem, int) and not isinstance(stem, bool) and stem >= 0
    check_options(
        "residual_path_depths",
        ("stem", stem, sound, "Give a whole number of at least 0"),
        ("branches", branches, all(map(is_count, branches)), "Give whole numbers of at least 1"),
    )
    paths = {stem: 1}
    for branch in branches:
        passed: collections.Counter[int] = collections.Counter(paths)
        for depth, count in paths.items():
            passed[depth + branch] += count
        paths = dict(passed)
    return dict(sorted(paths.items()))


def _degrees(workspace: Workspace, weights: Sequence[nn.Parameter]) -> list[int]:
    """The in-degree of each weight, on a sub-batch."""
    differentiator, config = workspace.differentiator, workspace.config
    part = workspace.passes.first_sub_batch(workspace.stream.next(), config.sub_batches)
    differentiator.seed = iteration_seed(config.seed, 1)

    def compute() -> list[int]:
        loss, _ = differentiator.loss_sum(part)
        return in_degrees(loss, weights)

    with workspace.passes.statistics(part), located("architecture_aware"):
        return workspace.passes.back_off.run(compute, part, "architecture_aware")


def _cubes(paths: Mapping[int, int]) -> int:
    return sum(count * depth**3 for depth, count in paths.items())


def _are_paths(paths: object) -> bool:
    return isinstance(paths, Mapping) and bool(paths) and all(is_count(n) for item in paths.items() for n in item)
