"""Losses of parts of a batch and their gradients, with and without a graph."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nio_hf.core.batches import batch_size, chunks, take
from nio_hf.core.scales import LayerScales
from nio_hf.errors import ConfigError, ModelError, Problem

LossFn = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor | float]]

MEAN_LOSS_TOLERANCE, AUTOCAST_TOLERANCE = 1e-5, 1e-2
"""Relative difference of the mean loss in parts and together that is rounding; our choice."""


class Differentiator:
    """Losses and gradients of parts of a batch.

    Args:
        model: its parameters are the theta that gradients are taken at.
        loss_fn: (model, batch) -> mean loss over the samples, or (loss_sum, weight).
        scales: the gradient tensors and the scaled tensors.
        micro_batch_size: samples computed at once; None for all.
        autocast: lower precision that the loss is computed in, e.g. torch.bfloat16; None for that of the model.

    Attributes:
        seed: of the random numbers of the next losses. Each time it is set they start anew with every gradient, so
            that a random loss is the same function in each pass.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        scales: LayerScales,
        micro_batch_size: int | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._autocast = autocast
        self._scales = scales
        self.micro_batch_size = micro_batch_size
        self.seed = 0

    @property
    def gradient_tensors(self) -> list[nn.Parameter]:
        """The tensors that form the gradient."""
        return self._scales.gradient

    @property
    def scaled_tensors(self) -> list[nn.Parameter]:
        """The tensors that are scaled."""
        return self._scales.scaled

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.scaled_tensors[0].device

    @property
    def loss_name(self) -> str:
        """What messages call the loss function."""
        return f"loss_fn ({getattr(self._loss_fn, '__qualname__', type(self._loss_fn).__name__)})"

    def loss_sum(self, batch: Any, part: int = 0) -> tuple[Tensor, Tensor | float]:
        """(sum of the losses, weight) of the micro-batch `part`; their ratio is the mean loss.

        Raises:
            ModelError: for a loss that is not a scalar.
        """
        _seed_device(self.device, self.seed, part)
        # A loss may take keys out of a batch that is computed again.
        own_batch = copy.copy(batch) if isinstance(batch, Mapping) else batch
        # A cache of cast weights would live as long as the autocast of `measuring` around it, and weights change.
        with (
            contextlib.nullcontext()
            if self._autocast is None
            else torch.autocast(self.device.type, self._autocast, cache_enabled=False)
        ):
            returned = self._loss_fn(self._model, own_batch)
        loss, weight = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"returned {_describe(loss)} as the loss"
            raise ModelError(Problem(self.loss_name, found, "Return a scalar tensor, or a pair (loss_sum, weight)"))
        if weight is None:
            size = batch_size(batch)
            return loss.reshape(()) * size, float(size)
        return loss.reshape(()), weight

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters of the model."""
        return self._model.parameters()

    def splits(self, batch: Any) -> bool:
        """Whether a batch is computed in micro-batches."""
        return self.micro_batch_size is not None and self.micro_batch_size < batch_size(batch)

    @torch.no_grad()
    def check_splits(self, batch: Any, size: int) -> None:
        """Check on two micro-batches of `size` samples that their losses add up.

        Raises:
            ConfigError: for a mean loss that is not a mean over samples.
        """
        part = take(batch, range(min(2 * size, batch_size(batch))))
        in_parts = [self.loss_sum(micro_batch, index) for index, micro_batch in enumerate(chunks(part, size))]
        losses, weights = zip(*in_parts, strict=True)
        whole, weight = self.loss_sum(part)
        tolerance = MEAN_LOSS_TOLERANCE if self._autocast is None else AUTOCAST_TOLERANCE
        means = float(_total(losses) / _total(weights)), float(whole / weight)
        if not all(map(math.isfinite, means)) or math.isclose(*means, rel_tol=tolerance):
            return
        found = f"the mean loss of two micro-batches is {means[0]:.6g} in parts, {means[1]:.6g} together"
        fix = "Return (loss_sum, weight), with the number that the mean is over as weight; or do without micro-batches"
        raise ConfigError(Problem(self.loss_name, found, fix))

    @torch.no_grad()
    def mean_loss(self, batch: Any) -> Tensor:
        """The mean loss of a batch."""
        parts = enumerate(chunks(batch, self.micro_batch_size))
        losses, weights = zip(*(self.loss_sum(part, index) for index, part in parts), strict=True)
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
        return dense(grads, wrt), loss

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
        return dense(torch.autograd.grad(mean, wrt, create_graph=True, allow_unused=True), wrt), mean.detach()

    def _check_depends(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            fix = "Compute the loss from the model that it receives, without detaching it or torch.no_grad"
            raise ModelError(Problem(self.loss_name, "the loss does not depend on the parameters of the model", fix))


def dense(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, with zeros where there is none."""
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
