"""Pass 2 over the sub-batches of a batch: Hessian-vector products, and the gradient of the scales.

    pass 1, for each d: g_d, of which n_d and u = sum_d h_d are kept (`sub_batches.first_pass`)
    pass 2, for each d: v_d = dJ/dg_d from g_d and u, the product H_d v_d, and dJ/domega_l = sum_d <W_l, (H_d v_d)_l>

v_d lives on the gradient tensors, the product is read on the scaled tensors. Training steps of arithmetic of both
passes, for any D: 4; 3 where graphs or gradients are kept between the passes; 5 for exact products of micro-batches.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nio_hf.core.batches import chunks
from nio_hf.core.collective import Collective
from nio_hf.core.config import CurvatureName
from nio_hf.core.gradcosine import dots, norm
from nio_hf.core.loss import Loss, dense, dense_gradient, gradient, graph_gradient, operations_without_graph
from nio_hf.core.memory import available_memory, graph_bytes, is_out_of_memory, release_memory
from nio_hf.core.objectives import Objective
from nio_hf.core.sub_batches import FirstPass, Keep, SubBatches, check_finite, on_sub_batch, splits
from nio_hf.core.tensors import ModelTensors
from nio_hf.errors import ModelError, Problem

logger = logging.getLogger(__name__)

Cotangent = Callable[[list[Tensor]], list[Tensor]]

FINITE_DIFFERENCE_STEP = {torch.float32: 1e-5, torch.float64: 1e-7}
"""||e v|| / ||theta|| of a central difference, by dtype; our choice, from measured errors."""
MEMORY_SHARE = 0.6
"""Part of the free memory that kept graphs or gradients may take; our choice."""
SMOOTHNESS = 0.3
"""Relative difference of finite differences at two step sizes above which a loss counts as not smooth; our choice."""


@dataclasses.dataclass(frozen=True)
class Path:
    """How Hessian-vector products are computed.

    Attributes:
        product: Double backward, or central differences of gradients.
        keep: Kind of results of pass 1 that are kept for pass 2.
    """

    product: Literal["exact", "finite_difference"]
    keep: Keep = None

    def steps(self, *, in_parts: bool) -> float:
        """Training steps of arithmetic of both passes; `in_parts` where sub-batches are computed in micro-batches."""
        if in_parts and self.product == "exact":
            return 5.0
        return 4.0 if self.keep is None else 3.0


def choose_path(
    curvature: CurvatureName, loss: Loss, tensors: ModelTensors, parts: SubBatches, micro_batch_size: int | None
) -> Path:
    """The path for a setting, from a look at the first sub-batch of this process.

    Raises:
        ModelError: For "exact", where an operation has no second derivative, named; for finite differences, where the
            loss is not smooth.
    """
    if not parts.owned:
        return Path("finite_difference" if curvature == "finite_difference" else "exact")
    index, part = next(iter(parts.owned.items()))
    seed = parts.seed_of(index)
    in_memory = functools.partial(on_sub_batch, loss, parts, index, micro_batch_size=micro_batch_size)
    if curvature != "finite_difference":
        reason, _ = in_memory(lambda size: _obstacle(loss, tensors, next(iter(chunks(part, size))), seed))
        if reason is None:
            keep = _graphs_fit(loss, tensors, part, seed, micro_batch_size, len(parts.owned))
            return Path("exact", "graphs" if keep else None)
        if curvature == "exact" or loss.autocast is not None:
            fix = 'Set NIOConfig.curvature to "finite_difference", which needs first derivatives only'
            if loss.autocast is not None:
                fix = 'Set NIOConfig.precision to "fp32": bfloat16 rounds away the difference of two gradients'
            raise ModelError(Problem(parts.where, reason, fix))
        logger.warning("Second derivatives by finite differences: %s.", reason)
    in_memory(lambda size: _check_smooth(loss, tensors, part, seed, size))
    available = available_memory(loss.device)
    size = sum(parameter.numel() * parameter.element_size() for parameter in tensors.gradient_parameters)
    fits = available is not None and len(parts.owned) * size <= MEMORY_SHARE * available
    return Path("finite_difference", "gradients" if fits else None)


def second_pass(
    loss: Loss,
    tensors: ModelTensors,
    parts: SubBatches,
    first: FirstPass,
    objective: Objective,
    initial: Sequence[Tensor],
    path: Path,
    collective: Collective,
) -> tuple[Tensor, int | None]:
    """Pass 2 over the sub-batches of all processes.

    Args:
        loss: Loss of the model.
        tensors: Gradient tensors and the scaled tensors.
        parts: Sub-batches of this process.
        first: Results of pass 1; those that it kept are used up.
        objective: J.
        initial: M initial tensors W_l.
        path: Way of computing products.
        collective: Processes that share the work.

    Returns:
        (m,) dJ/domega_l = sum_d <W_l, (H_d v_d)_l>, and the micro-batch size that it took.

    Raises:
        NumericsError: A gradient that is not finite, with the tensor and, of several, the rank that computed it.
    """
    micro_batch_size = first.micro_batch_size
    product = exact_product if path.product == "exact" else finite_difference_product

    def drop_kept() -> bool:
        dropped = bool(first.kept)
        first.kept.clear()
        return dropped

    with collective.together():
        total = initial[0].new_zeros(len(initial))
        for index, part in parts.owned.items():
            # What is kept serves one attempt: a graph is used up by it.
            kept = [first.kept.pop(index)] if index in first.kept else []

            def cotangent(g: list[Tensor], own_norm: Tensor = first.sums.norms[index]) -> list[Tensor]:
                return objective.cotangent(g, own_norm, first.sums)

            def compute(
                size: int | None,
                part: Any = part,
                seed: int = parts.seed_of(index),
                kept: list[list[Tensor]] = kept,
                cotangent: Cotangent = cotangent,
            ) -> list[Tensor]:
                # No name here holds the gradient, so that the product may free it.
                return product(
                    loss, tensors, part, cotangent, seed=seed, micro_batch_size=size, kept=kept.pop() if kept else None
                )

            found, micro_batch_size = on_sub_batch(loss, parts, index, compute, micro_batch_size, drop_kept)
            total += dots(initial, found)
            del found
        fix = "Lower NIOConfig.lr, narrow NIOConfig.scale_range, or set another NIOConfig.curvature"
        check_finite(total, tensors.scaled, "scale gradient", parts.where, fix)
    collective.sum_(total)
    return total, micro_batch_size


def exact_product(
    loss: Loss,
    tensors: ModelTensors,
    batch: Any,
    cotangent: Cotangent,
    *,
    seed: int,
    micro_batch_size: int | None = None,
    kept: list[Tensor] | None = None,
) -> list[Tensor]:
    """H_d v_d on the scaled tensors by double backward, v_d = cotangent(g_d).

    Args:
        loss: Loss of the model.
        tensors: Gradient tensors and the scaled tensors.
        batch: Sub-batch d.
        cotangent: Function that gives v_d from g_d.
        seed: Seed of the random numbers of the loss.
        micro_batch_size: Samples computed at once; g_d is then computed first, and a graph for each part.
        kept: g_d with its graph; None to compute it.
    """
    wrt, scaled = tensors.gradient_parameters, tensors.scaled_parameters
    if kept is None and not splits(batch, micro_batch_size):
        kept, _ = graph_gradient(loss, batch, wrt, seed=seed)
    if kept is not None:
        return _double_backward(kept, cotangent([tensor.detach() for tensor in kept]), scaled)
    grads, _, weight = gradient(loss, batch, wrt, seed=seed, micro_batch_size=micro_batch_size)
    vector = cotangent(dense(grads, wrt))
    del grads
    total: list[Tensor] = []
    for position, part in enumerate(chunks(batch, micro_batch_size)):
        with_graph, _ = graph_gradient(loss, part, wrt, seed=seed, weight=weight, part=position)
        product = _double_backward(with_graph, vector, scaled)
        total = product if not total else list(torch._foreach_add(total, product))
    return total


def finite_difference_product(
    loss: Loss,
    tensors: ModelTensors,
    batch: Any,
    cotangent: Cotangent,
    *,
    seed: int,
    micro_batch_size: int | None = None,
    kept: list[Tensor] | None = None,
    step: float = 1.0,
) -> list[Tensor]:
    """H_d v_d on the scaled tensors as (g_d(theta + e v) - g_d(theta - e v)) / 2e; theta is put back exactly.

    It needs first-order gradients only, so any attention kernel, compiled model or activation checkpointing but the
    reentrant one works. It is wrong where the loss is not smooth, e.g. through top-k routing.

    Args:
        loss: As in [`exact_product`], like the five that follow.
        tensors: Gradient tensors and scaled tensors.
        batch: Sub-batch d.
        cotangent: Function that gives v_d from g_d.
        seed: Seed of the random numbers of the loss.
        micro_batch_size: Samples computed at once.
        kept: g_d; None to compute it.
        step: Factor of e, which is `FINITE_DIFFERENCE_STEP` ||theta|| / ||v||.
    """
    wrt, scaled = tensors.gradient_parameters, tensors.scaled_parameters
    gradient_by = functools.partial(dense_gradient, loss, batch, seed=seed, micro_batch_size=micro_batch_size)
    if kept is None:
        kept, _ = gradient_by(wrt)
    vector = cotangent(kept)
    del kept
    theta = [parameter.data for parameter in wrt]
    length = norm(vector)
    relative = step * FINITE_DIFFERENCE_STEP[theta[0].dtype]
    size = torch.where(length > 0, relative * norm(theta) / length, torch.zeros_like(length))
    saved = [tensor.clone() for tensor in theta]
    try:
        _displace(theta, saved, vector, size)
        forward, _ = gradient_by(scaled)
        _displace(theta, saved, vector, -size)
        backward, _ = gradient_by(scaled)
    finally:
        torch._foreach_copy_(theta, saved)
    scale = torch.where(size > 0, 0.5 / size, torch.zeros_like(size))
    return list(torch._foreach_mul(torch._foreach_sub(forward, backward), scale))


def _obstacle(loss: Loss, tensors: ModelTensors, samples: Any, seed: int) -> str | None:
    """Why some samples have no exact second derivative; None where they have one."""
    wrt = tensors.gradient_parameters
    try:
        without = operations_without_graph(loss, samples, wrt, seed=seed)
        if without:
            return f"the backward of {', '.join(without)} leaves no graph to differentiate again"
        with_graph, _ = graph_gradient(loss, samples, wrt, seed=seed)
        _double_backward(with_graph, [tensor.detach() for tensor in with_graph], tensors.scaled_parameters)
    except RuntimeError as error:
        unsupported = ("derivative for", "don't support automatic differentiation")
        if not any(text in str(error) for text in unsupported):
            raise
        return f"an operation has no second derivative ({str(error).splitlines()[0]})"
    return None


def _check_smooth(loss: Loss, tensors: ModelTensors, part: Any, seed: int, micro_batch_size: int | None) -> None:
    """Refuse a loss whose gradient jumps, by finite differences along the gradient at two step sizes.

    Raises:
        ModelError: Where they differ.
    """
    near, far = (
        finite_difference_product(
            loss, tensors, part, lambda g: g, seed=seed, micro_batch_size=micro_batch_size, step=step
        )
        for step in (1.0, 3.0)
    )
    difference = float(norm(torch._foreach_sub(near, far)) / norm(far).clamp_min(torch.finfo(far[0].dtype).tiny))
    if difference > SMOOTHNESS:
        found = (
            f"finite differences at two step sizes differ by {difference:.0%}: "
            "the gradient jumps, as in top-k routing and at the edge of a ReLU"
        )
        fix = 'Set NIOConfig.curvature to "exact", or NIOConfig.search to "balance", which needs no second derivatives'
        raise ModelError(Problem(loss.name, found, fix))


def _graphs_fit(
    loss: Loss, tensors: ModelTensors, part: Any, seed: int, micro_batch_size: int | None, count: int
) -> bool:
    """Whether the graphs of `count` sub-batches, and as much again as one for its product, fit into what is free."""
    available = available_memory(loss.device)
    if available is None or splits(part, micro_batch_size):
        return False
    try:
        with graph_bytes(list(loss.model.parameters())) as counted:
            graph_gradient(loss, part, tensors.gradient_parameters, seed=seed)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        counted = []
    if not counted:
        release_memory(loss.device)
        return False
    fits = (count + 1) * counted[0] <= MEMORY_SHARE * available
    logger.info(
        "Graphs of %d sub-batches need about %.1f MiB of %.1f MiB that are free: they are %s between the passes.",
        count,
        (count + 1) * counted[0] / 2**20,
        available / 2**20,
        "kept" if fits else "not kept",
    )
    return fits


def _double_backward(with_graph: list[Tensor], vector: list[Tensor], scaled: Sequence[nn.Parameter]) -> list[Tensor]:
    """H v by double backward; zeros where the gradient does not depend on a tensor."""
    pairs = [(g, v) for g, v in zip(with_graph, vector, strict=True) if g.requires_grad]
    if not pairs:
        return [torch.zeros_like(tensor) for tensor in scaled]
    outputs, vectors = zip(*pairs, strict=True)
    return dense(torch.autograd.grad(outputs, list(scaled), grad_outputs=vectors, allow_unused=True), scaled)


def _displace(theta: list[Tensor], start: list[Tensor], direction: list[Tensor], step: Tensor) -> None:
    """Set theta to start + step * direction, in place."""
    torch._foreach_copy_(theta, start)
    for tensor, part in zip(theta, direction, strict=True):
        tensor.addcmul_(part, step)
