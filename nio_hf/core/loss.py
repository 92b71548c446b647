"""Losses of parts of a batch and their gradients: pure functions of loss, batch, tensors and seed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nio_hf.core.batches import batch_size, chunks, copied, take
from nio_hf.core.config import NIOConfig
from nio_hf.errors import ConfigError, ModelError, Problem

LossFn = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor | float]]

MEAN_LOSS_TOLERANCE, AUTOCAST_TOLERANCE = 1e-5, 1e-2
"""Relative difference of the mean loss in parts and together that is rounding; our choice."""


@dataclasses.dataclass(frozen=True)
class Loss:
    """The loss of a model on a batch.

    Attributes:
        model: Model whose parameters are the theta that gradients are taken at.
        function: (model, batch) -> mean loss over the samples, or (loss_sum, weight).
        device: Device of the model.
        autocast: Lower precision to compute in, e.g. torch.bfloat16; None for that of the model.
    """

    model: nn.Module
    function: LossFn
    device: torch.device
    autocast: torch.dtype | None = None

    @property
    def name(self) -> str:
        """Name of the loss function in messages."""
        return f"loss_fn ({getattr(self.function, '__qualname__', type(self.function).__name__)})"

    def __call__(self, batch: Any, seed: int, part: int = 0) -> tuple[Tensor, Tensor | float]:
        """(sum of the losses, weight) of micro-batch `part`; their ratio is the mean loss.

        The random numbers that the loss draws depend on `seed` and `part` alone.

        Raises:
            ModelError: A loss that is not a scalar.
        """
        _seed_device(self.device, seed, part)
        # A loss may take keys out of a batch that is computed again.
        own_batch = copied(batch) if isinstance(batch, Mapping) else batch
        # A cache of cast weights would live as long as the autocast of `measuring` around it, and weights change.
        with (
            contextlib.nullcontext()
            if self.autocast is None
            else torch.autocast(self.device.type, self.autocast, cache_enabled=False)
        ):
            returned = self.function(self.model, own_batch)
        loss, weight = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"returned {_describe(loss)} as the loss"
            raise ModelError(Problem(self.name, found, "Return a scalar tensor, or a pair (loss_sum, weight)"))
        if weight is None:
            size = batch_size(batch)
            return loss.reshape(()) * size, float(size)
        return loss.reshape(()), weight


def make_loss(model: nn.Module, function: LossFn, config: NIOConfig, device: torch.device) -> Loss:
    """The loss of a model on its device, in the precision of the settings."""
    return Loss(model, function, device, torch.bfloat16 if config.precision == "bf16" else None)


def gradient(
    loss: Loss, batch: Any, wrt: Sequence[Tensor], *, seed: int, micro_batch_size: int | None = None
) -> tuple[list[Tensor | None], Tensor, Tensor | float]:
    """Gradient of the mean loss, the mean loss, and the weight; None where no gradient reaches a tensor."""
    parts = list(chunks(batch, micro_batch_size))
    if len(parts) == 1:
        value, weight = loss(batch, seed)
        mean = value / weight
        _check_depends(loss, mean)
        return list(torch.autograd.grad(mean, wrt, allow_unused=True)), mean.detach(), weight
    totals: list[Tensor | None] = [None] * len(wrt)
    losses, weights = [], []
    for index, part in enumerate(parts):
        value, weight = loss(part, seed, index)
        _check_depends(loss, value)
        grads = torch.autograd.grad(value, wrt, allow_unused=True)
        totals = [_add(total, grad) for total, grad in zip(totals, grads, strict=True)]
        losses.append(value.detach())
        weights.append(weight)
    total_weight = _total(weights)
    means = [None if total is None else total / total_weight for total in totals]
    return means, _total(losses) / total_weight, total_weight


def dense_gradient(
    loss: Loss, batch: Any, wrt: Sequence[Tensor], *, seed: int, micro_batch_size: int | None = None
) -> tuple[list[Tensor], Tensor]:
    """As `gradient`, with zeros where no gradient reaches a tensor, and without the weight."""
    grads, value, _ = gradient(loss, batch, wrt, seed=seed, micro_batch_size=micro_batch_size)
    return dense(grads, wrt), value


def graph_gradient(
    loss: Loss, batch: Any, wrt: Sequence[Tensor], *, seed: int, weight: Tensor | float | None = None, part: int = 0
) -> tuple[list[Tensor], Tensor]:
    """Gradient of loss_sum / weight with its graph, and that loss.

    The batch is computed whole: a micro-batch is given as such, with the weight of its sub-batch and its number.
    """
    value, own_weight = loss(batch, seed, part)
    _check_depends(loss, value)
    mean = value / (own_weight if weight is None else weight)
    return dense(torch.autograd.grad(mean, wrt, create_graph=True, allow_unused=True), wrt), mean.detach()


def dense(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, with zeros where there is none; sparse ones, as of `nn.Embedding(sparse=True)`, become dense."""
    filled = (torch.zeros_like(t) if grad is None else grad for grad, t in zip(grads, like, strict=True))
    return [grad.to_dense() if grad.is_sparse else grad for grad in filled]


def operations_without_graph(loss: Loss, batch: Any, wrt: Sequence[Tensor], *, seed: int) -> list[str]:
    """Names of the custom operations whose backward leaves no graph.

    `torch.autograd.grad` through such an operation (`once_differentiable`, a fused kernel) gives a wrong second
    derivative without an error, since the node that would complain is not on the path to the tensors asked for.
    """
    value, weight = loss(batch, seed)
    _check_depends(loss, value)
    found: dict[str, None] = {}

    def inspect_backward(name: str, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]) -> None:
        for tensor in inputs:
            if tensor is not None and (not tensor.requires_grad or "Error" in _node_name(tensor)):
                found[name] = None

    handles = [node.register_hook(functools.partial(inspect_backward, name)) for node, name in _custom_nodes(value)]
    try:
        if handles:
            torch.autograd.grad(value / weight, wrt, create_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return list(found)


@torch.no_grad()
def check_micro_batches(loss: Loss, batch: Any, size: int, *, seed: int) -> None:
    """Check on two micro-batches of `size` samples that their losses add up.

    Raises:
        ConfigError: A loss of the batch that is no mean over its parts, with the reason where it is known.
    """
    part = take(batch, range(min(2 * size, batch_size(batch))))
    losses, weights = zip(*(loss(micro, seed, index) for index, micro in enumerate(chunks(part, size))), strict=True)
    whole, weight = loss(part, seed)
    tolerance = MEAN_LOSS_TOLERANCE if loss.autocast is None else AUTOCAST_TOLERANCE
    in_parts, together = float(_total(losses) / _total(weights)), float(whole / weight)
    if not (math.isfinite(in_parts) and math.isfinite(together)):
        return
    if math.isclose(in_parts, together, rel_tol=tolerance):
        return
    again, again_weight = loss(part, seed, len(losses))
    where, found = loss.name, f"the mean loss of two micro-batches is {in_parts:.6g} in parts, {together:.6g} together"
    if not math.isclose(together, float(again / again_weight), rel_tol=tolerance):
        found += ", and it draws random numbers"
        fix = "Set NIOConfig.micro_batch_size to None: the parts of a batch would draw others than the whole"
    else:
        fix = (
            "Return (loss_sum, weight), with the number that the mean is over as weight. Where the loss compares the "
            "samples of a batch with each other, set NIOConfig.micro_batch_size to None"
        )
    raise ConfigError(Problem(where, found, fix))


def _check_depends(loss: Loss, value: Tensor) -> None:
    if not value.requires_grad:
        fix = "Compute the loss from the model that it receives, without detaching it or torch.no_grad"
        raise ModelError(Problem(loss.name, "the loss does not depend on the parameters of the model", fix))


def _custom_nodes(value: Tensor) -> Iterator[tuple[Any, str]]:
    """The nodes of a graph that come from a `torch.autograd.Function`, with its name."""
    pending, seen = [value.grad_fn], set()
    while pending:
        node: Any = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", None)
        if function is not None:
            yield node, function.__name__
        pending += [following for following, _ in node.next_functions]


def _node_name(tensor: Tensor) -> str:
    return "" if tensor.grad_fn is None else tensor.grad_fn.name()


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
