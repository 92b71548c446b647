"""Random numbers of the samples of a batch: each has its own, whatever batch and process it is in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_SEEDS = 2**62


class SampleRandom:
    """A random generator on the CPU for each of B samples.

    Args:
        seeds: of the samples.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(self, count: int) -> Tensor:
        """Uniform numbers in [0, 1), (B, count)."""
        rows = [torch.rand(count, generator=generator, dtype=torch.float32) for generator in self._generators]
        return torch.stack(rows)

    def normal(self, count: int) -> Tensor:
        """Standard normal numbers, (B, count)."""
        rows = [torch.randn(count, generator=generator, dtype=torch.float32) for generator in self._generators]
        return torch.stack(rows)

    def seed(self, sample: int) -> int:
        """A seed for another generator, from the numbers of a sample."""
        return int(torch.randint(_SEEDS, (), generator=self._generators[sample]))

    @contextlib.contextmanager
    def of_batch(self) -> Iterator[None]:
        """Let torch's CPU generator draw, for the whole batch, what its first sample decides; it is restored."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed(0))
            yield


def draw_seed() -> int:
    """The seed of a sample, from torch's CPU generator."""
    return int(torch.randint(_SEEDS, ()))
