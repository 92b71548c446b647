"""The batches of NIO: a function of the seed and the iteration alone, and apart from the training's own loader."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from nio_hf.errors import DataError, Problem
from nio_hf.training.isolation import isolated_random_state

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
        order = _permutation(samples, seed, 0)
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
            yield from self._pool[_permutation(len(self._pool), self._seed, epoch)].tolist()
            epoch += 1


class EpochSampler(Sampler[_Draw]):
    """Draws of an epoch of training: (number of the draw, sample index), a new permutation each epoch.

    An epoch is a function of the seed and its number, in whatever process and after whatever resume.

    Args:
        samples: number of samples in the data set.
        seed: of the permutations.
        repeats: how often an epoch draws each of its samples (repeated augmentation, arXiv 1901.09335). An epoch keeps
            its length, so it sees a `repeats`-th of the samples; copies follow each other.
    """

    def __init__(self, samples: int, seed: int, repeats: int = 1) -> None:
        self._samples = samples
        self._seed = seed
        self._repeats = repeats
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; a data loader calls it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._samples

    def __iter__(self) -> Iterator[_Draw]:
        order = _permutation(self._samples, self._seed, self._epoch)[: -(-self._samples // self._repeats)]
        draws = (
            (self._epoch * self._repeats + copy, index) for index in order.tolist() for copy in range(self._repeats)
        )
        return itertools.islice(draws, self._samples)


class SeededDataset(Dataset[Any]):
    """Samples whose augmentation is drawn from (seed, number of the draw, sample index), in whatever process.

    Its keys are pairs of the last two. Where the data set fetches whole batches and draws no random numbers, it goes on
    doing so, which is faster.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed
        self._fetches_batches = hasattr(dataset, "__getitems__")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, draws: list[_Draw]) -> list[Any]:
        """The samples of a batch."""
        with _undisturbed():
            if self._fetches_batches:
                before = _random_state()
                samples: list[Any] = self._dataset.__getitems__([index for _, index in draws])
                if _random_state() == before:
                    return samples
                self._fetches_batches = False
            return [self._sample(draw) for draw in draws]

    def __getitem__(self, draw: _Draw) -> Any:
        with _undisturbed():
            return self._sample(draw)

    def _sample(self, draw: _Draw) -> Any:
        number, index = draw
        seed_everything(mixed_seed(self._seed, number, index))
        return self._dataset[index]


class SeededStream(IterableDataset[Any]):
    """Samples of a stream whose augmentation is drawn from (seed, pass, position in the stream of its worker).

    Args:
        dataset: the stream; `set_epoch`, where it has that, is told the number of each pass.
        seed: of the augmentation.
        endless: begin another pass where one ends. A training then is one epoch, in which a resumed run finds its
            place whatever the number of passes.
    """

    def __init__(self, dataset: IterableDataset[Any], seed: int, *, endless: bool = False) -> None:
        self._dataset = dataset
        self._seed = seed
        self._endless = endless
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; a data loader calls it."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        for number in itertools.count(self._epoch):
            if hasattr(self._dataset, "set_epoch"):
                self._dataset.set_epoch(number)
            delivered = False
            for sample in self._one_pass(number):
                delivered = True
                yield sample
            if not self._endless or not delivered:
                return

    def _one_pass(self, number: int) -> Iterator[Any]:
        worker = get_worker_info()
        stream = mixed_seed(self._seed, number, 0 if worker is None else worker.id)
        samples = iter(self._dataset)
        for position in itertools.count():
            with _undisturbed():
                seed_everything(mixed_seed(stream, 0, position))
                try:
                    sample = next(samples)
                except StopIteration:
                    return
            yield sample


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
    worker_init_fn: Callable[[int], Any] | None = None,
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
        "worker_init_fn": worker_init_fn,
    }
    if isinstance(dataset, IterableDataset):
        # Workers would share the stream in an order that depends on how many they are.
        one_process = {**common, "num_workers": 0, "multiprocessing_context": None}
        return DataLoader(SeededStream(dataset, seed), batch_size=batch_size, drop_last=True, **one_process)
    sampler = NIOBatchSampler(len(dataset), batch_size, holdout_batches, iterations, seed)
    return DataLoader(SeededDataset(dataset, seed), batch_sampler=sampler, **common)


def mixed_seed(seed: int, number: int, index: int) -> int:
    """A seed of 63 bits for the pair (number, index), unrelated to those of other pairs and seeds."""
    return int(np.random.SeedSequence([seed, number, index]).generate_state(1, np.uint64)[0] % 2**63)


def _permutation(count: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch, 0)))


def _undisturbed() -> contextlib.AbstractContextManager[None]:
    """Leave the random state of the main process as it was: what training draws there must not depend on the data."""
    is_worker = get_worker_info() is not None
    return contextlib.nullcontext() if is_worker else isolated_random_state(torch.device("cpu"))


def _random_state() -> tuple[Any, ...]:
    """What `seed_everything` seeds, to tell whether anything was drawn."""
    _, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    return random.getstate(), bytes(keys), rest, bytes(torch.get_rng_state().numpy())


def seed_everything(seed: int) -> None:
    """Seed what augmentation on the CPU draws from: Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
