"""The batches of NIO: a function of the seed and the iteration alone, and apart from the training's own loader."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from nio_hf.durable.isolation import OwnGenerator, isolated_random_state, own_generators, reseed
from nio_hf.errors import DataError, Problem

_Draw = tuple[int, int]
_COLLATION = 2**62
"""It takes the place of the sample index in the seed of a collation."""


class NIOBatchSampler(Sampler[list[_Draw]]):
    """Batches of (batch number, sample index): first those of the report, then further ones.

    Samples of the report are drawn once and never again. The other samples are drawn in permutations, one after the
    other, so that each is seen equally often. A batch depends on the seed and its number only.

    Args:
        samples: Number of samples in the data set.
        batch_size: B.
        report_batches: Batches of the report.
        further_batches: Batches behind them.
        seed: Seed of the permutations.

    Raises:
        DataError: A data set too small for the report batches and, where there are further ones, one of these.
    """

    def __init__(self, samples: int, batch_size: int, report_batches: int, further_batches: int, seed: int) -> None:
        fewest = report_batches + bool(further_batches)
        if samples < batch_size * fewest:
            more = " and one more" if further_batches else ""
            found = f"{samples} samples for {report_batches} report batches{more} of {batch_size}"
            most = samples // fewest
            fix = f"Lower nio_batch_size to {most}, or" if most > 1 else "Give more samples, or lower"
            fix += " nio_report_batches"
            raise DataError(Problem("train_dataset", found, fix))
        self._batch_size = batch_size
        self._batches = report_batches + further_batches
        self._seed = seed
        order = _permutation(samples, seed, 0)
        self._reported, self._pool = order[: batch_size * report_batches], order[batch_size * report_batches :]

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[_Draw]]:
        positions = self._positions()
        for number in range(self._batches):
            yield [(number, next(positions)) for _ in range(self._batch_size)]

    def _positions(self) -> Iterator[int]:
        yield from self._reported.tolist()
        epoch = 1
        while True:
            yield from self._pool[_permutation(len(self._pool), self._seed, epoch)].tolist()
            epoch += 1


class EpochSampler(Sampler[_Draw]):
    """Draws of an epoch of training: (number of the draw, sample index), a new permutation each epoch.

    An epoch is a function of the seed and its number, in whatever process and after whatever resume.

    Args:
        samples: Number of samples in the data set.
        seed: Seed of the permutations.
        repeats: How often an epoch draws each of its samples (repeated augmentation, arXiv 1901.09335). An epoch keeps
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

    Its keys are pairs of the last two. Generators that the data set owns are seeded like the global ones. Where the
    data set fetches whole batches and draws no random numbers, it goes on doing so, which is faster.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed
        self._own = own_generators(dataset)
        self._fetches_batches = hasattr(dataset, "__getitems__") and not self._own

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, draws: list[_Draw]) -> list[Any]:
        """The samples of a batch."""
        with _undisturbed(*self._own):
            if self._fetches_batches:
                before = _random_state()
                samples: list[Any] = self._dataset.__getitems__([index for _, index in draws])
                if _random_state() == before:
                    return samples
                self._fetches_batches = False
            return [self._sample(draw) for draw in draws]

    def __getitem__(self, draw: _Draw) -> Any:
        with _undisturbed(*self._own):
            return self._sample(draw)

    def _sample(self, draw: _Draw) -> Any:
        number, index = draw
        _seed_with_own(self._own, mixed_seed(self._seed, number, index))
        return self._dataset[index]


class SeededStream(IterableDataset[Any]):
    """Samples of a stream whose augmentation is drawn from (seed, pass, position in the stream of its worker).

    Args:
        dataset: Stream; `set_epoch`, where it has that, is told the number of each pass.
        seed: Seed of the augmentation.
        endless: Begin another pass where one ends. A training then is one epoch, in which a resumed run finds its
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


class _SeededCollator:
    """Collates batches with random numbers drawn from (seed, number of the batch), in whatever process.

    Generators that the collator owns are seeded like the global ones. A collator may make generators on its first call,
    with a state that depends on the process. It is then called again, on the same batch fetched anew.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], seed: int) -> None:
        self._collate = collate
        self._seed = seed

    def __call__(self, number: int, fetch: Callable[[], list[Any]]) -> Any:
        with _undisturbed(self._collate):
            own, batch = self._collated(number, fetch())
            if len(own_generators(self._collate)) > len(own):
                _, batch = self._collated(number, fetch())
            return batch

    def _collated(self, number: int, samples: list[Any]) -> tuple[list[OwnGenerator], Any]:
        own = own_generators(self._collate)
        _seed_with_own(own, mixed_seed(self._seed, number, _COLLATION))
        return own, self._collate(samples)


class _SeededBatches(Dataset[Any]):
    """Collated batches. Their keys are what [`NIOBatchSampler`] gives."""

    def __init__(self, samples: SeededDataset, collate: _SeededCollator) -> None:
        self._samples = samples
        self._collate = collate

    def __getitem__(self, draws: list[_Draw]) -> Any:
        return self._collate(draws[0][0], lambda: self._samples.__getitems__(draws))


class _SeededStreamBatches(IterableDataset[Any]):
    """Collated batches of a stream. Samples that do not fill the last one are dropped."""

    def __init__(self, samples: SeededStream, collate: _SeededCollator, batch_size: int) -> None:
        self._samples = samples
        self._collate = collate
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Any]:
        stream = iter(self._samples)
        for number in itertools.count():
            samples = list(itertools.islice(stream, self._batch_size))
            if len(samples) < self._batch_size:
                return
            yield self._collate(number, functools.partial(list, samples))


def nio_dataloader(
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    *,
    batch_size: int,
    report_batches: int,
    further_batches: int,
    seed: int,
    num_workers: int = 0,
    pin_memory: bool = False,
    multiprocessing_context: str | None = None,
    worker_init_fn: Callable[[int], Any] | None = None,
) -> DataLoader[Any]:
    """A loader of `report_batches + further_batches` batches, which leaves the random state of this process alone.

    A batch depends on the seed, its number and its samples, whatever the number of workers. The global generators are
    seeded for each sample and for the collation of each batch; so are generators that the data set and the collator own
    (see [`own_generators`]). Generators of a stream, a closure or the owner of a bound method are not seeded.

    Raises:
        DataError: An empty data set or one too small.
    """
    collator = _SeededCollator(collate, seed)
    common: dict[str, Any] = {
        "batch_size": None,
        "collate_fn": _as_it_is,
        "generator": torch.Generator().manual_seed(seed),
        "pin_memory": pin_memory,
        "worker_init_fn": worker_init_fn,
    }
    if isinstance(dataset, IterableDataset):
        # Workers would share the stream in an order that depends on how many they are.
        return DataLoader(_SeededStreamBatches(SeededStream(dataset, seed), collator, batch_size), **common)
    return DataLoader(
        _SeededBatches(SeededDataset(dataset, seed), collator),
        sampler=NIOBatchSampler(len(dataset), batch_size, report_batches, further_batches, seed),
        num_workers=num_workers,
        multiprocessing_context=multiprocessing_context if num_workers else None,
        **common,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def mixed_seed(seed: int, number: int, index: int) -> int:
    """A seed of 63 bits for the pair (number, index), unrelated to those of other pairs and seeds."""
    return int(np.random.SeedSequence([seed, number, index]).generate_state(1, np.uint64)[0] % 2**63)


def _permutation(count: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed_seed(seed, epoch, 0)))


def _undisturbed(*owners: Any) -> contextlib.AbstractContextManager[None]:
    """Leave the random state of the main process as it was: what training draws there must not depend on the data."""
    is_worker = get_worker_info() is not None
    return contextlib.nullcontext() if is_worker else isolated_random_state(torch.device("cpu"), *owners)


def _seed_with_own(own: list[OwnGenerator], seed: int) -> None:
    """Seed the global generators, and each of some others differently."""
    seed_everything(seed)
    for position, generator in enumerate(own):
        reseed(generator, mixed_seed(seed, 1, position))


def _random_state() -> tuple[Any, ...]:
    """The state of the generators that `seed_everything` seeds, which tells whether anything was drawn."""
    _, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    return random.getstate(), bytes(keys), rest, bytes(torch.get_rng_state().numpy())


def seed_everything(seed: int) -> None:
    """Seed what augmentation on the CPU draws from: Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
