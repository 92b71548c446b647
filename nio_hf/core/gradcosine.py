"""GradCosine and gradient norm of D sub-batches, from sums over the sub-batches.

Letters: B samples, D sub-batches, P numbers in the gradient tensors. With g_d the gradient of sub-batch d (P,),
n_d = ||g_d||, h_d = g_d / n_d and u = sum_d h_d,

    GC = mean over pairs i != j of cos(g_i, g_j) = (||u||^2 - D) / (D (D - 1)),    GN = mean_d n_d.

Source: Yang et al., NeurIPS 2022, section 4; the form in u is ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from nio_hf.core.batches import too_many_sub_batches
from nio_hf.errors import ConfigError


def sub_batch_windows(batch_size: int, sub_batches: int) -> list[list[int]]:
    """Positions of the samples of each sub-batch.

    Window d is range(floor(d B / D), floor((d + 1) B / D)): a partition into parts that differ by at most one sample.

    Args:
        batch_size: B.
        sub_batches: D, from 2 to B.

    Returns:
        D lists of positions.

    Raises:
        ConfigError: D outside [2, B].
    """
    if not 2 <= sub_batches <= batch_size:
        raise ConfigError(too_many_sub_batches(sub_batches, batch_size))
    starts = [d * batch_size // sub_batches for d in range(sub_batches + 1)]
    return [list(range(start, end)) for start, end in itertools.pairwise(starts)]


def published_windows(batch_size: int, sub_batches: int, overlap: float) -> list[list[int]]:
    """The published slicing of a batch, whose windows grow with their number.

    With l = B // D the first is [0, (1 + r) l), the last [(1 - r) l (D - 1), B), and the i-th in between
    [(1 - r) l i, (1 + r) l (i + 1)), each bound truncated to a whole number.

    Args:
        batch_size: B.
        sub_batches: D, from 2 to B.
        overlap: r in [0, 1).

    Returns:
        D lists of positions.

    Raises:
        ConfigError: D outside [2, B].

    Source: Yang et al., NeurIPS 2022, as the specification states it.
    """
    if not 2 <= sub_batches <= batch_size:
        raise ConfigError(too_many_sub_batches(sub_batches, batch_size))
    length = batch_size // sub_batches
    bounds = [(int((1 - overlap) * length * i), int((1 + overlap) * length * (i + 1))) for i in range(sub_batches)]
    bounds[0] = (0, bounds[0][1])
    bounds[-1] = (bounds[-1][0], batch_size)
    return [list(range(start, min(end, batch_size))) for start, end in bounds]


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
    """The sums over sub-batches that GC, GN and the objectives need, in one buffer that one all-reduce can sum.

    Args:
        like: The gradient tensors, for shapes, dtype and device.
        sub_batches: D.

    Attributes:
        buffer: u, (P,).
        unit_sum: u, as views of the buffer.
        scalars: (2, D): n_d and L_d.
    """

    def __init__(self, like: Sequence[Tensor], sub_batches: int) -> None:
        sizes = [tensor.numel() for tensor in like]
        self.buffer = like[0].new_zeros(sum(sizes))
        views = self.buffer.split(sizes)
        self.unit_sum = [view.view(tensor.shape) for view, tensor in zip(views, like, strict=True)]
        self.scalars = like[0].new_zeros(2, sub_batches)

    @property
    def norms(self) -> Tensor:
        """(D,) norms n_d."""
        return self.scalars[0]

    @property
    def sub_batches(self) -> int:
        """D."""
        return self.scalars.shape[1]

    @property
    def grad_cosine(self) -> Tensor:
        """GC, a scalar tensor."""
        return cosine_from_unit_sum(self.unit_sum, self.sub_batches)

    def add(self, index: int, gradient: Sequence[Tensor], loss: Tensor) -> None:
        """Add sub-batch `index` with its gradient g_d, tensor by tensor, and its mean loss."""
        gradient_norm = norm(gradient)
        self.scalars[0, index] = gradient_norm
        self.scalars[1, index] = loss
        torch._foreach_add_(self.unit_sum, torch._foreach_mul(list(gradient), gradient_norm.reciprocal()))
