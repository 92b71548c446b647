"""The two passes over a sub-batch: its gradient, and its Hessian-vector product with a cotangent.

    pass 1, for each d: g_d, of which n_d and u = sum_d h_d are kept
    pass 2, for each d: v_d from g_d and u, the product H_d v_d, and dJ/domega_l = sum_d <W_l, (H_d v_d)_l>

v_d lives on the gradient tensors, the product is read on the scaled tensors. The paths differ in what they keep
between the passes and in how they form the product; they give the same numbers.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nio_hf.core.batches import batch_size, chunks
from nio_hf.core.config import NIOConfig
from nio_hf.core.gradcosine import norm
from nio_hf.core.scales import LayerScales
from nio_hf.errors import ModelError, Problem

LossFn = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor | float]]
CotangentFn = Callable[[list[Tensor]], list[Tensor]]

FINITE_DIFFERENCE_STEP = {torch.float32: 1e-5, torch.float64: 1e-7}
"""||e v|| / ||theta|| of a central difference, by dtype; our choice, from measured errors."""


class Differentiator:
    """Losses and gradients of parts of a batch.

    Args:
        model: its parameters are the theta that gradients are taken at.
        loss_fn: (model, batch) -> mean loss over the samples, or (loss_sum, weight).
        scales: the gradient tensors and the scaled tensors.
        micro_batch_size: samples computed at once; None for all.

    Attributes:
        seed: of the random numbers of the next losses. Each time it is set they start anew with every gradient, so
            that a random loss is the same function in each pass.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, scales: LayerScales, micro_batch_size: int | None = None
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self.gradient_tensors = scales.gradient
        self.scaled_tensors = scales.scaled
        self.micro_batch_size = micro_batch_size
        self.seed = 0

    @property
    def loss_name(self) -> str:
        """What messages call the loss function."""
        return f"loss_fn ({getattr(self._loss_fn, '__qualname__', type(self._loss_fn).__name__)})"

    def loss_sum(self, batch: Any, part: int = 0) -> tuple[Tensor, Tensor | float]:
        """(sum of the losses, weight) of the micro-batch `part`; their ratio is the mean loss.

        Raises:
            ModelError: for a loss that is not a scalar.
        """
        _seed_device(self.scaled_tensors[0].device, self.seed, part)
        # A loss may take keys out of a batch that is computed again.
        returned = self._loss_fn(self._model, copy.copy(batch) if isinstance(batch, Mapping) else batch)
        loss, weight = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"returned {_describe(loss)} as the loss"
            raise ModelError(Problem(self.loss_name, found, "Return a scalar tensor, or a pair (loss_sum, weight)"))
        if weight is None:
            size = batch_size(batch)
            return loss.reshape(()) * size, float(size)
        return loss.reshape(()), weight

    def mean_loss(self, batch: Any) -> Tensor:
        """L of a batch; a scalar tensor."""
        parts = chunks(batch, self.micro_batch_size)
        losses, weights = zip(*(self.loss_sum(part, index) for index, part in enumerate(parts)), strict=True)
        mean: Tensor = _total(losses) / _total(weights)
        return mean

    def gradient(self, batch: Any, wrt: Sequence[Tensor]) -> tuple[list[Tensor | None], Tensor, Tensor | float]:
        """Gradient of the mean loss, the mean loss, and the weight; None where no gradient reaches a tensor."""
        parts = list(chunks(batch, self.micro_batch_size))
        if len(parts) == 1:
            loss, weight = self.loss_sum(batch)
            mean = loss / weight
            self._check_depends(mean)
            return list(torch.autograd.grad(mean, wrt, allow_unused=True)), mean.detach(), weight
        totals: list[Tensor | None] = [None] * len(wrt)
        losses, weights = [], []
        for index, part in enumerate(parts):
            loss, weight = self.loss_sum(part, index)
            self._check_depends(loss)
            grads = torch.autograd.grad(loss, wrt, allow_unused=True)
            totals = [_add(total, grad) for total, grad in zip(totals, grads, strict=True)]
            losses.append(loss.detach())
            weights.append(weight)
        total_weight = _total(weights)
        means = [None if total is None else total / total_weight for total in totals]
        return means, _total(losses) / total_weight, total_weight

    def dense_gradient(self, batch: Any, wrt: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """As `gradient`, with zeros where no gradient reaches a tensor, and without the weight."""
        grads, loss, _ = self.gradient(batch, wrt)
        return _dense(grads, wrt), loss

    def graph_gradient(
        self, batch: Any, weight: Tensor | float | None = None, part: int = 0
    ) -> tuple[list[Tensor], Tensor]:
        """Gradient of loss_sum / weight on the gradient tensors, with its graph, and that loss.

        The batch is computed whole: a micro-batch is given as such, with the weight of its sub-batch and its number.
        """
        loss, own_weight = self.loss_sum(batch, part)
        self._check_depends(loss)
        mean = loss / (own_weight if weight is None else weight)
        wrt = self.gradient_tensors
        return _dense(torch.autograd.grad(mean, wrt, create_graph=True, allow_unused=True), wrt), mean.detach()

    def _check_depends(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            fix = "Compute the loss from the model that it receives, without detaching it or torch.no_grad"
            raise ModelError(Problem(self.loss_name, "the loss does not depend on the parameters of the model", fix))


class CurvaturePath(Protocol):
    """How the two passes are computed."""

    name: str

    def first(self, batch: Any) -> tuple[list[Tensor], Tensor]:
        """Pass 1 for the next sub-batch: (g_d, L_d), without graph."""

    def second(self, index: int, batch: Any, cotangent: CotangentFn) -> list[Tensor]:
        """Pass 2 for the sub-batch that was the index-th of pass 1: H_d v_d on the scaled tensors."""

    def reset(self) -> None:
        """Forget what pass 1 kept."""


class Exact:
    """Double backward through the gradient, recomputed in pass 2: 4 training steps of work, 5 in micro-batches."""

    name = "exact"

    def __init__(self, differentiator: Differentiator) -> None:
        self._differentiator = differentiator

    def first(self, batch: Any) -> tuple[list[Tensor], Tensor]:
        """Pass 1 without a graph."""
        return self._differentiator.dense_gradient(batch, self._differentiator.gradient_tensors)

    def second(self, index: int, batch: Any, cotangent: CotangentFn) -> list[Tensor]:
        """Pass 2 through a new graph; in micro-batches g_d comes first, then a graph for each."""
        differentiator = self._differentiator
        parts = list(chunks(batch, differentiator.micro_batch_size))
        if len(parts) == 1:
            gradient, _ = differentiator.graph_gradient(batch)
            return _product(gradient, cotangent(_detach(gradient)), differentiator.scaled_tensors)
        grads, _, weight = differentiator.gradient(batch, differentiator.gradient_tensors)
        vector = cotangent(_dense(grads, differentiator.gradient_tensors))
        total: list[Tensor] = []
        for position, part in enumerate(parts):
            gradient, _ = differentiator.graph_gradient(part, weight, position)
            product = _product(gradient, vector, differentiator.scaled_tensors)
            total = product if not total else list(torch._foreach_add(total, product))
        return total

    def reset(self) -> None:
        """Nothing is kept."""


class ExactKept:
    """Double backward through the graphs of pass 1; 3 training steps of arithmetic, the memory of all graphs."""

    name = "exact_kept"

    def __init__(self, differentiator: Differentiator) -> None:
        self._differentiator = differentiator
        self._kept: list[list[Tensor]] = []

    def first(self, batch: Any) -> tuple[list[Tensor], Tensor]:
        """Pass 1 with a graph, which is kept."""
        gradient, loss = self._differentiator.graph_gradient(batch)
        self._kept.append(gradient)
        return _detach(gradient), loss

    def second(self, index: int, batch: Any, cotangent: CotangentFn) -> list[Tensor]:
        """Pass 2 through the kept graph, which is freed."""
        gradient, self._kept[index] = self._kept[index], []
        return _product(gradient, cotangent(_detach(gradient)), self._differentiator.scaled_tensors)

    def reset(self) -> None:
        """Free what pass 2 did not reach."""
        self._kept.clear()


class FiniteDifference:
    """Central difference of first-order gradients, (g_d(theta + e v) - g_d(theta - e v)) / 2e.

    4 training steps of arithmetic, or 3 where pass 1 keeps g_d. Needs first-order gradients only, so any attention
    kernel, activation checkpointing or compiled model works.
    """

    def __init__(self, differentiator: Differentiator, keep_gradients: bool) -> None:
        self._differentiator = differentiator
        self._keep = keep_gradients
        self._kept: list[list[Tensor]] = []
        self.name = "finite_difference_kept" if keep_gradients else "finite_difference"

    def first(self, batch: Any) -> tuple[list[Tensor], Tensor]:
        """Pass 1 without a graph; g_d is kept where it is to be."""
        gradient, loss = self._differentiator.dense_gradient(batch, self._differentiator.gradient_tensors)
        if self._keep:
            self._kept.append(gradient)
        return gradient, loss

    def second(self, index: int, batch: Any, cotangent: CotangentFn) -> list[Tensor]:
        """Pass 2 as the difference of two gradients; theta is put back exactly."""
        differentiator = self._differentiator
        if self._keep:
            gradient, self._kept[index] = self._kept[index], []
        else:
            gradient, _ = differentiator.dense_gradient(batch, differentiator.gradient_tensors)
        vector = cotangent(gradient)
        theta = [parameter.data for parameter in differentiator.gradient_tensors]
        relative = FINITE_DIFFERENCE_STEP[theta[0].dtype]
        length = norm(vector)
        step = torch.where(length > 0, relative * norm(theta) / length, torch.zeros_like(length))
        with _displaced(theta, vector, step):
            forward, _ = differentiator.dense_gradient(batch, differentiator.scaled_tensors)
        with _displaced(theta, vector, -step):
            backward, _ = differentiator.dense_gradient(batch, differentiator.scaled_tensors)
        scale = torch.where(step > 0, 0.5 / step, torch.zeros_like(step))
        return list(torch._foreach_mul(torch._foreach_sub(forward, backward), scale))

    def reset(self) -> None:
        """Free what pass 2 did not reach."""
        self._kept.clear()


def make_path(config: NIOConfig, differentiator: Differentiator) -> CurvaturePath:
    """The path that a configuration names."""
    match config.curvature:
        case "auto" | "exact":
            return Exact(differentiator)
        case "exact_kept":
            return ExactKept(differentiator)
        case "finite_difference":
            return FiniteDifference(differentiator, keep_gradients=False)
        case "finite_difference_kept":
            return FiniteDifference(differentiator, keep_gradients=True)


def _product(gradient: list[Tensor], vector: list[Tensor], scaled: list[nn.Parameter]) -> list[Tensor]:
    """H v by double backward; zeros where the gradient does not depend on a tensor."""
    pairs = [(g, v) for g, v in zip(gradient, vector, strict=True) if g.requires_grad]
    if not pairs:
        return [torch.zeros_like(tensor) for tensor in scaled]
    outputs, vectors = zip(*pairs, strict=True)
    return _dense(torch.autograd.grad(outputs, scaled, grad_outputs=vectors, allow_unused=True), scaled)


@contextlib.contextmanager
def _displaced(theta: list[Tensor], direction: list[Tensor], step: Tensor) -> Iterator[None]:
    """Move theta by step * direction in place, and put the exact values back."""
    saved = [tensor.clone() for tensor in theta]
    try:
        for tensor, part in zip(theta, direction, strict=True):
            tensor.addcmul_(part, step)
        yield
    finally:
        torch._foreach_copy_(theta, saved)


def _detach(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]


def _dense(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) if grad is None else grad for grad, t in zip(grads, like, strict=True)]


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if total is None or part is None:
        return part if total is None else total
    return total + part


def _total(values: Sequence[Any]) -> Any:
    return sum(values[1:], start=values[0])


def _seed_device(device: torch.device, seed: int, part: int) -> None:
    """Seed the generators that a loss on a device draws from, and no others."""
    mixed = (seed * 1_000_003 + part) % 2**63
    torch.default_generator.manual_seed(mixed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(mixed)


def _describe(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
