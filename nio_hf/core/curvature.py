"""The two passes over a sub-batch: its gradient, and its Hessian-vector product with a cotangent.

    pass 1, for each d: g_d, of which n_d and u = sum_d h_d are kept
    pass 2, for each d: v_d from g_d and u, the product H_d v_d, and dJ/domega_l = sum_d <W_l, (H_d v_d)_l>

v_d lives on the gradient tensors, the product is read on the scaled tensors. The paths differ in what they keep
between the passes and in how they form the product; they give the same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nio_hf.core.batches import chunks
from nio_hf.core.config import CurvatureName
from nio_hf.core.differentiator import Differentiator, dense
from nio_hf.core.gradcosine import norm
from nio_hf.core.memory import available_memory, graph_bytes, is_out_of_memory, release_memory

logger = logging.getLogger(__name__)

CotangentFn = Callable[[list[Tensor]], list[Tensor]]

FINITE_DIFFERENCE_STEP = {torch.float32: 1e-5, torch.float64: 1e-7}
"""||e v|| / ||theta|| of a central difference, by dtype; our choice, from measured errors."""
MEMORY_SHARE = 0.6
"""Part of the free memory that kept graphs may take; our choice."""


class CurvaturePath(Protocol):
    """How the two passes are computed."""

    @property
    def name(self) -> str:
        """As in `NIOConfig.curvature`."""

    def first(self, batch: Any) -> tuple[list[Tensor], Tensor]:
        """Pass 1 for the next sub-batch: (g_d, L_d), without graph."""

    def second(self, index: int, batch: Any, cotangent: CotangentFn) -> list[Tensor]:
        """Pass 2 for the sub-batch that was the index-th of pass 1: H_d v_d on the scaled tensors."""

    def reset(self) -> None:
        """Forget what pass 1 kept."""

    def give_way(self) -> bool:
        """Forget what pass 1 kept and keep nothing from here on, to free memory; False where nothing was to be kept."""


class _Keeping:
    """What pass 1 keeps of each sub-batch for pass 2, until memory is needed."""

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self._gradients: dict[int, list[Tensor]] = {}
        self._count = 0

    def _store(self, gradient: list[Tensor] | None) -> None:
        """Keep the gradient of the next sub-batch, or nothing of it."""
        if self._keep and gradient is not None:
            self._gradients[self._count] = gradient
        self._count += 1

    def _take(self, index: int) -> list[Tensor] | None:
        """The gradient of a sub-batch, which is then kept no more."""
        return self._gradients.pop(index, None)

    def reset(self) -> None:
        """Forget everything, for another pass 1."""
        self._gradients.clear()
        self._count = 0

    def give_way(self) -> bool:
        """Forget the gradients and keep none from here on; False where none were to be kept."""
        kept, self._keep = self._keep, False
        self._gradients.clear()
        return kept


class Exact(_Keeping):
    """Double backward through the gradient.

    4 training steps of arithmetic; 3 where the graphs of pass 1 are kept, in the memory of all of them; 5 in
    micro-batches, of which none is kept.
    """

    def __init__(self, differentiator: Differentiator, keep_graphs: bool = False) -> None:
        super().__init__(keep_graphs)
        self._differentiator = differentiator

    @property
    def name(self) -> str:
        """As in `NIOConfig.curvature`."""
        return "exact_kept" if self._keep else "exact"

    def first(self, batch: Any) -> tuple[list[Tensor], Tensor]:
        """Pass 1: with a graph where it is to be kept, else without."""
        differentiator = self._differentiator
        if not self._keep or differentiator.splits(batch):
            gradient, loss = differentiator.dense_gradient(batch, differentiator.gradient_tensors)
            self._store(None)
            return gradient, loss
        gradient, loss = differentiator.graph_gradient(batch)
        self._store(gradient)
        return _detach(gradient), loss

    def second(self, index: int, batch: Any, cotangent: CotangentFn) -> list[Tensor]:
        """Pass 2 through the kept graph or a new one; in micro-batches g_d comes first, then a graph for each."""
        differentiator = self._differentiator
        scaled = differentiator.scaled_tensors
        gradient = self._take(index)
        if gradient is None and not differentiator.splits(batch):
            gradient, _ = differentiator.graph_gradient(batch)
        if gradient is not None:
            return _product(gradient, cotangent(_detach(gradient)), scaled)
        grads, _, weight = differentiator.gradient(batch, differentiator.gradient_tensors)
        vector = cotangent(dense(grads, differentiator.gradient_tensors))
        del grads
        total: list[Tensor] = []
        for position, part in enumerate(chunks(batch, differentiator.micro_batch_size)):
            gradient, _ = differentiator.graph_gradient(part, weight, position)
            product = _product(gradient, vector, scaled)
            total = product if not total else list(torch._foreach_add(total, product))
        return total


class FiniteDifference(_Keeping):
    """Central difference of first-order gradients, (g_d(theta + e v) - g_d(theta - e v)) / 2e.

    4 training steps of arithmetic, or 3 where pass 1 keeps g_d. Needs first-order gradients only, so any attention
    kernel, compiled model or activation checkpointing but the reentrant one works.
    """

    def __init__(self, differentiator: Differentiator, keep_gradients: bool = False) -> None:
        super().__init__(keep_gradients)
        self._differentiator = differentiator

    @property
    def name(self) -> str:
        """As in `NIOConfig.curvature`."""
        return "finite_difference_kept" if self._keep else "finite_difference"

    def first(self, batch: Any) -> tuple[list[Tensor], Tensor]:
        """Pass 1 without a graph; g_d is kept where it is to be."""
        gradient, loss = self._differentiator.dense_gradient(batch, self._differentiator.gradient_tensors)
        self._store(gradient)
        return gradient, loss

    def second(self, index: int, batch: Any, cotangent: CotangentFn) -> list[Tensor]:
        """Pass 2 as the difference of two gradients; theta is put back exactly."""
        differentiator = self._differentiator
        gradient = self._take(index)
        if gradient is None:
            gradient, _ = differentiator.dense_gradient(batch, differentiator.gradient_tensors)
        vector = cotangent(gradient)
        del gradient
        theta = [parameter.data for parameter in differentiator.gradient_tensors]
        relative = FINITE_DIFFERENCE_STEP[theta[0].dtype]
        length = norm(vector)
        step = torch.where(length > 0, relative * norm(theta) / length, torch.zeros_like(length))
        saved = [tensor.clone() for tensor in theta]
        try:
            _displace(theta, saved, vector, step)
            forward, _ = differentiator.dense_gradient(batch, differentiator.scaled_tensors)
            _displace(theta, saved, vector, -step)
            backward, _ = differentiator.dense_gradient(batch, differentiator.scaled_tensors)
        finally:
            torch._foreach_copy_(theta, saved)
        scale = torch.where(step > 0, 0.5 / step, torch.zeros_like(step))
        return list(torch._foreach_mul(torch._foreach_sub(forward, backward), scale))


def make_path(curvature: CurvatureName, differentiator: Differentiator, batch: Any, sub_batches: int) -> CurvaturePath:
    """The path that a setting names; "auto" keeps graphs where they fit.

    Args:
        curvature: as in [`NIOConfig`].
        differentiator: gives losses and gradients.
        batch: a sub-batch of usual size, to measure the memory of its graph on; None for a process without any.
        sub_batches: number of graphs to keep, that of the sub-batches of this process.
    """
    match curvature:
        case "auto":
            return Exact(differentiator, keep_graphs=_graphs_fit(differentiator, batch, sub_batches))
        case "exact" | "exact_kept":
            return Exact(differentiator, keep_graphs=curvature == "exact_kept")
        case "finite_difference" | "finite_difference_kept":
            return FiniteDifference(differentiator, keep_gradients=curvature == "finite_difference_kept")


def _graphs_fit(differentiator: Differentiator, batch: Any, count: int) -> bool:
    """Whether the graphs of `count` sub-batches, and as much again as one for its product, fit into what is free."""
    available = available_memory(differentiator.device)
    if batch is None or available is None or differentiator.splits(batch):
        return False
    try:
        with graph_bytes(list(differentiator.parameters())) as counted:
            differentiator.graph_gradient(batch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        counted = []
    if not counted:
        release_memory(differentiator.device)
        return False
    needed = (count + 1) * counted[0]
    fits = needed <= MEMORY_SHARE * available
    logger.info(
        "Graphs of %d sub-batches need about %.1f MiB of %.1f MiB that are free: they are %s between the passes.",
        count,
        needed / 2**20,
        available / 2**20,
        "kept" if fits else "not kept",
    )
    return fits


def _product(gradient: list[Tensor], vector: list[Tensor], scaled: list[nn.Parameter]) -> list[Tensor]:
    """H v by double backward; zeros where the gradient does not depend on a tensor."""
    pairs = [(g, v) for g, v in zip(gradient, vector, strict=True) if g.requires_grad]
    if not pairs:
        return [torch.zeros_like(tensor) for tensor in scaled]
    outputs, vectors = zip(*pairs, strict=True)
    return dense(torch.autograd.grad(outputs, scaled, grad_outputs=vectors, allow_unused=True), scaled)


def _displace(theta: list[Tensor], start: list[Tensor], direction: list[Tensor], step: Tensor) -> None:
    """Set theta to start + step * direction, in place."""
    torch._foreach_copy_(theta, start)
    for tensor, part in zip(theta, direction, strict=True):
        tensor.addcmul_(part, step)


def _detach(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]
