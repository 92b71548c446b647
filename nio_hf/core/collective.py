"""The processes that share a NIO run: who computes which sub-batch, and sums over all."""

from __future__ import annotations

import dataclasses

import torch.distributed as dist
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Collective:
    """A group of processes, by default this one alone.

    Attributes:
        rank: of this process.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Collective:
        """The default torch.distributed group, or this process alone where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def owned(self, sub_batches: int) -> range:
        """The sub-batches of this process: d with d mod size = rank."""
        return range(self.rank, sub_batches, self.size)

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def broadcast_(self, tensor: Tensor) -> None:
        """Replace a tensor by that of rank 0."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
