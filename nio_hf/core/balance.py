"""How large additive tensors are beside what they are added to, such as positions beside patches or tokens."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nio_hf.core.batches import chunks
from nio_hf.core.collective import Collective
from nio_hf.core.groups import blocks_of
from nio_hf.core.loss import Loss
from nio_hf.core.sub_batches import SubBatches, on_sub_batch

BALANCING_COST = 2 / 3
"""Arithmetic of two forward passes, in training steps."""
_LEAST_TURN = 1e-6
"""1 - cosine below which additive tensors do not reach the first block; our choice, rounding in fp32."""


@torch.no_grad()
def balancing_factor(
    loss: Loss,
    additive: Sequence[Tensor],
    parts: SubBatches,
    collective: Collective,
    micro_batch_size: int | None = None,
) -> float:
    """How many times larger additive tensors p have to be to be as large as the activations a that they are added to.

        factor = ||a|| / ||p|| = cos / sqrt(1 - cos^2)        cos = <h, a> / (||h|| ||a||)

    h = a + p is the input of the first block, a the same with p = 0, over all positions where a is not zero. The angle
    between them tells the ratio of the lengths where p is at right angles to a, also where a normalisation stands
    between the sum and the block, as in BERT. The ratio and its use are our choice.

    Args:
        loss: of the model, whose forward is all that is used of it.
        additive: these tensors; they are zero for a while, and have their values back in the end.
        parts: the sub-batches of this process.
        collective: the processes that share the batch.
        micro_batch_size: samples computed at once; None for a sub-batch.

    Returns:
        The factor, at least 1. It is 1 where the additive tensors do not reach the first block (biases of attention
        scores do not), and for a model without blocks, see [`blocks_of`].
    """
    block = next(iter(blocks_of(loss.model)), None)
    sums = torch.zeros(3, device=loss.device)
    with collective.together():
        for index, part in parts.owned.items():

            def compute(size: int | None, part: Any = part, seed: int = parts.seed_of(index)) -> Tensor:
                with_additive = _inputs(loss, block, part, seed, size)
                with _zeroed(additive):
                    without = _inputs(loss, block, part, seed, size)
                return _products(with_additive, without)

            found, micro_batch_size = on_sub_batch(loss, parts, index, compute, micro_batch_size)
            sums += found.to(loss.device)
    collective.sum_(sums)
    product, squares, squares_without = sums.tolist()
    cosine = product / math.sqrt(squares * squares_without) if squares and squares_without else 1.0
    if cosine > 1 - _LEAST_TURN:
        return 1.0
    return max(1.0, cosine / math.sqrt(1 - cosine**2))


def _inputs(loss: Loss, block: nn.Module | None, batch: Any, seed: int, size: int | None) -> list[Tensor]:
    """What a block is given first in the forward passes of a batch, one for each of its parts."""
    caught: list[Tensor] = []
    for number, part in enumerate(chunks(batch, size)):
        found: list[Tensor] = []

        def catch(module: nn.Module, args: Any, kwargs: Any, found: list[Tensor] = found) -> None:
            given = (*args, *kwargs.values())
            found += [value for value in given if isinstance(value, Tensor) and value.is_floating_point()][:1]

        handle = None if block is None else block.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            loss(part, seed, number)
        finally:
            if handle is not None:
                handle.remove()
        caught += [value.detach().clone() for value in found[:1]]
    return caught


def _products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """(3,): <h, a>, ||h||^2 and ||a||^2 over the positions where a is not zero."""
    products = []
    for h, a in zip(left, right, strict=True):
        counted = a.ne(0).any(dim=-1, keepdim=True)
        h, a = (h * counted).float().flatten(), a.float().flatten()
        products.append(torch.stack([torch.dot(h, a), torch.dot(h, h), torch.dot(a, a)]))
    return torch.stack(products).sum(dim=0) if products else torch.zeros(3)


@contextlib.contextmanager
def _zeroed(tensors: Sequence[Tensor]) -> Iterator[None]:
    values = [tensor.clone() for tensor in tensors]
    try:
        torch._foreach_zero_(list(tensors))
        yield
    finally:
        torch._foreach_copy_(list(tensors), values)
