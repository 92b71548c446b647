"""GradCosine and gradient norm of D sub-batches, from sums over the sub-batches.

Letters: B samples, D sub-batches, P numbers in the gradient tensors. With g_d the gradient of sub-batch d (P,),
n_d = ||g_d||, h_d = g_d / n_d and u = sum_d h_d,

    GC = mean over pairs i != j of cos(g_i, g_j) = (||u||^2 - D) / (D (D - 1)),    GN = mean_d n_d.

Source: Yang et al., NeurIPS 2022, section 4; the form in u is ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nio_hf.core.batches import too_many_sub_batches
from nio_hf.errors import ConfigError, Problem


def sub_batch_windows(batch_size: int, sub_batches: int, overlap: float = 0.0) -> list[list[int]]:
    """Positions of the samples of each sub-batch.

    Window d is range(floor(d B / D), floor((d + 1) B / D) + floor(r B / D)) modulo B: at r = 0 a partition into parts
    that differ by at most one sample. Our choice; the published slicing is in `reference.published_windows`.

    Args:
        batch_size: B.
        sub_batches: D, from 2 to B.
        overlap: r in [0, 1).

    Returns:
        D lists of positions.

    Raises:
        ConfigError: for D outside [2, B] or r outside [0, 1).
    """
    problems = []
    if not 2 <= sub_batches <= batch_size:
        problems.append(too_many_sub_batches(sub_batches, batch_size))
    if not 0 <= overlap < 1:
        problems.append(Problem("overlap", f"{overlap!r}", "Give a number in [0, 1)"))
    if problems:
        raise ConfigError(*problems)
    extra = math.floor(overlap * batch_size / sub_batches)
    starts = [d * batch_size // sub_batches for d in range(sub_batches + 1)]
    return [
        [position % batch_size for position in range(start, end + extra)] for start, end in itertools.pairwise(starts)
    ]


def cosine_from_unit_sum(unit_sum: Sequence[Tensor], sub_batches: int) -> Tensor:
    """GC of the sum u of D unit gradients, given tensor by tensor; a scalar tensor."""
    return (squared_norm(unit_sum) - sub_batches) / (sub_batches * (sub_batches - 1))


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of a vector given as tensors; a scalar tensor."""
    result: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))
    return result


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Squared Euclidean norm of a vector given as tensors; a scalar tensor."""
    return norm(tensors).square()


def dots(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Inner products tensor by tensor, of shape (len(left),)."""
    return torch.stack([torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(left, right, strict=True)])


class GradientSums:
    """The sums over sub-batches that GC, GN and the cotangents need, in one buffer that one all-reduce can sum.

    Args:
        like: the gradient tensors, for shapes, dtype and device.
        sub_batches: D.
        with_gradient_sum: also keep sum_d g_d, which the variance objective needs.

    Attributes:
        buffer: u, and sum_d g_d behind it where kept; (P,) or (2 P,).
        unit_sum: u, as views of the buffer.
        gradient_sum: sum_d g_d, as views of the buffer; empty where it is not kept.
        norms_and_losses: (2, D), n_d and L_d.
    """

    def __init__(self, like: Sequence[Tensor], sub_batches: int, with_gradient_sum: bool) -> None:
        sizes = [tensor.numel() for tensor in like]
        self.buffer = like[0].new_zeros((1 + with_gradient_sum) * sum(sizes))
        views = list(self.buffer.split(sizes * (1 + with_gradient_sum)))
        shaped = [view.view(like[index % len(like)].shape) for index, view in enumerate(views)]
        self.unit_sum = shaped[: len(like)]
        self.gradient_sum = shaped[len(like) :]
        self.norms_and_losses = like[0].new_zeros(2, sub_batches)

    @property
    def norms(self) -> Tensor:
        """(D,) norms n_d."""
        return self.norms_and_losses[0]

    def add(self, index: int, gradient: Sequence[Tensor], loss: Tensor) -> None:
        """Add sub-batch `index` with its gradient g_d, tensor by tensor, and its mean loss."""
        gradient_norm = norm(gradient)
        self.norms_and_losses[0, index] = gradient_norm
        self.norms_and_losses[1, index] = loss
        torch._foreach_add_(self.unit_sum, torch._foreach_mul(list(gradient), gradient_norm.reciprocal()))
        if self.gradient_sum:
            torch._foreach_add_(self.gradient_sum, list(gradient))

    def summary(self) -> Tensor:
        """(2 + 2 D,) GC, GN, then the norms and the losses: all that the host reads of an iteration."""
        grad_cosine = cosine_from_unit_sum(self.unit_sum, self.norms.numel())
        return torch.cat([torch.stack([grad_cosine, self.norms.mean()]), self.norms_and_losses.flatten()])
