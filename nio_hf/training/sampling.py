"""The batches of NIO: a function of the seed and the iteration alone, and apart from the training's own loader."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from nio_hf.errors import DataError, Problem

_Draw = tuple[int, int]


class NIOBatchSampler(Sampler[list[_Draw]]):
    """Batches of (batch number, sample index): first the held-out ones, then one per iteration.

    Held-out samples are drawn once and never again. The other samples are drawn in permutations, one after the
    other, so that each is seen equally often. A batch depends on the seed and its number only.

    Args:
        samples: number of samples in the data set.
        batch_size: B.
        holdout_batches: batches that are held out.
        iterations: batches behind them.
        seed: of the permutations.

    Raises:
        DataError: for a data set too small for the held-out batches and one more.
    """

    def __init__(self, samples: int, batch_size: int, holdout_batches: int, iterations: int, seed: int) -> None:
        if samples < batch_size * (holdout_batches + 1):
            found = f"{samples} samples for {holdout_batches} held-out batches and one more of {batch_size}"
            raise DataError(Problem("train_dataset", found, "Lower nio_batch_size or nio_holdout_batches"))
        self._batch_size = batch_size
        self._batches = holdout_batches + iterations
        self._seed = seed
        order = self._permutation(samples, 0)
        self._held_out, self._pool = order[: batch_size * holdout_batches], order[batch_size * holdout_batches :]

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[_Draw]]:
        positions = self._positions()
        for number in range(self._batches):
            yield [(number, next(positions)) for _ in range(self._batch_size)]

    def _positions(self) -> Iterator[int]:
        yield from self._held_out.tolist()
        epoch = 1
        while True:
            yield from self._pool[self._permutation(len(self._pool), epoch)].tolist()
            epoch += 1

    def _permutation(self, count: int, epoch: int) -> torch.Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(_mix(self._seed, epoch, 0)))


class SeededDataset(Dataset[Any]):
    """Samples whose augmentation is drawn from (seed, batch number, sample index), in whatever process.

    Where the data set fetches whole batches and draws no random numbers, it goes on doing so, which is faster.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed
        self._fetches_batches = hasattr(dataset, "__getitems__")

    def __getitems__(self, draws: list[_Draw]) -> list[Any]:
        """The samples of a batch."""
        if self._fetches_batches:
            before = _random_state()
            samples: list[Any] = self._dataset.__getitems__([index for _, index in draws])
            if _random_state() == before:
                return samples
            self._fetches_batches = False
        return [self[draw] for draw in draws]

    def __getitem__(self, draw: _Draw) -> Any:
        number, index = draw
        seed_everything(_mix(self._seed, number, index))
        return self._dataset[index]


def nio_dataloader(
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    *,
    batch_size: int,
    holdout_batches: int,
    iterations: int,
    seed: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    multiprocessing_context: str | None = None,
) -> DataLoader[Any]:
    """A loader of `holdout_batches + iterations` batches that leaves all global random state to its caller.

    Raises:
        DataError: for an empty data set or one too small.
    """
    common: dict[str, Any] = {
        "collate_fn": collate,
        "generator": torch.Generator().manual_seed(seed),
        "num_workers": num_workers,
        "pin_memory": pin_memory,
        "multiprocessing_context": multiprocessing_context if num_workers else None,
    }
    if isinstance(dataset, IterableDataset):
        return DataLoader(dataset, batch_size=batch_size, drop_last=True, **common)
    sampler = NIOBatchSampler(len(dataset), batch_size, holdout_batches, iterations, seed)
    return DataLoader(SeededDataset(dataset, seed), batch_sampler=sampler, **common)


def _mix(seed: int, number: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, number, index]).generate_state(1, np.uint64)[0] % 2**63)


def _random_state() -> tuple[Any, ...]:
    """What `seed_everything` seeds, to tell whether anything was drawn."""
    _, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    return random.getstate(), bytes(keys), rest, bytes(torch.get_rng_state().numpy())


def seed_everything(seed: int) -> None:
    """Seed what augmentation on the CPU draws from: Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
