"""Sample-wise GradCosine, D = B, at about two training steps of arithmetic.

    first:   n_i = ||g_i|| of every sample, by vectorised gradients of batches of one
    second:  u = sum_i g_i / n_i, as the gradient of sum_i L_i / n_i

Source: our choice; the loop over samples in `two_pass` gives the same numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from nio_hf.core.batches import batch_size, map_tensors
from nio_hf.core.differentiator import Differentiator
from nio_hf.core.gradcosine import GradientSums

CHUNK_BYTES = 2**29
"""Memory for the gradients of the samples that are computed at once; our choice."""


def sample_wise_sums(model: nn.Module, differentiator: Differentiator, batch: Any) -> GradientSums:
    """Pass 1 of the two passes for D = B, vectorised over the samples.

    Args:
        model: in the state of [`mode.measuring`].
        differentiator: of the model; its micro-batch size bounds how many samples are computed at once.
        batch: B samples on the device of the model.

    Returns:
        The sums over the B gradients, each of one sample.

    Raises:
        RuntimeError: where the loss cannot be vectorised, e.g. one that draws random numbers, or depends on values.
    """
    with warnings.catch_warnings():
        # An operation without a batching rule, as in Swin's masks, is looped over: slower, and the same.
        warnings.filterwarnings("ignore", "There is a performance drop")
        return _sums(model, differentiator, batch)


def _sums(model: nn.Module, differentiator: Differentiator, batch: Any) -> GradientSums:
    samples, rebuild = _flatten(batch)
    sums = GradientSums(differentiator.gradient_tensors, batch_size(batch), with_gradient_sum=False)
    losses_and_norms = _losses_and_norms(model, differentiator, samples, rebuild)
    sums.norms_and_losses.copy_(losses_and_norms.flip(0))
    for positions in torch.arange(batch_size(batch)).split(differentiator.micro_batch_size or batch_size(batch)):
        part = [sample[positions.to(sample.device)] for sample in samples]
        losses: Tensor = vmap(lambda *one: _mean_loss(differentiator, rebuild(one)))(*part)
        weighted = (losses / sums.norms[positions.to(sums.norms.device)]).sum()
        parts = torch.autograd.grad(weighted, differentiator.gradient_tensors, allow_unused=True)
        for total, share in zip(sums.unit_sum, parts, strict=True):
            if share is not None:
                total += share
    return sums


def _losses_and_norms(
    model: nn.Module, differentiator: Differentiator, samples: list[Tensor], rebuild: Callable[..., Any]
) -> Tensor:
    """(2, B) losses L_i and norms n_i."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    values = {f"model.{names[id(tensor)]}": tensor.detach() for tensor in differentiator.gradient_tensors}
    bound = _Bound(model, lambda one: _mean_loss(differentiator, one))

    def loss_of(weights: dict[str, Tensor], *one: Tensor) -> tuple[Tensor, Tensor]:
        loss: Tensor = functional_call(bound, weights, (rebuild(one),))
        return loss, loss.detach()

    def measured(*one: Tensor) -> tuple[Tensor, Tensor]:
        gradient, loss = grad(loss_of, has_aux=True)(values, *one)
        return loss, torch.stack([part.square().sum() for part in gradient.values()]).sum().sqrt()

    gradient_bytes = sum(value.numel() * value.element_size() for value in values.values())
    chunk = max(1, CHUNK_BYTES // gradient_bytes)
    if differentiator.micro_batch_size is not None:
        chunk = min(chunk, differentiator.micro_batch_size)
    return torch.stack(vmap(measured, chunk_size=chunk)(*samples))


class _Bound(nn.Module):
    """A loss as the forward of a module around the model, so that the parameters of the model can be replaced."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> Tensor:
        """The loss of a batch."""
        return self._loss(batch)


def _mean_loss(differentiator: Differentiator, batch: Any) -> Tensor:
    loss, weight = differentiator.loss_sum(batch)
    return loss / weight


def _flatten(batch: Any) -> tuple[list[Tensor], Callable[..., Any]]:
    """The per-sample tensors of a batch, and what makes a batch of one from one entry of each."""
    samples: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        if tensor.ndim:
            samples.append(tensor)
        return tensor

    map_tensors(collect, batch)

    def rebuild(one: tuple[Tensor, ...]) -> Any:
        entries = iter(one)
        return map_tensors(lambda tensor: next(entries)[None] if tensor.ndim else tensor, batch)

    return samples, rebuild
