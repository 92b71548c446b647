"""Batches of any structure: their size, parts of them, and a stream that ends in one known way."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nio_hf.errors import ConfigError, DataError, Problem

logger = logging.getLogger(__name__)


def batch_size(batch: Any) -> int:
    """Number of samples of a batch: the common length of its tensors along dimension 0.

    Raises:
        DataError: where no tensor has a dimension 0, or the lengths differ.
    """
    lengths = {path: leaf.shape[0] for path, leaf in _leaves(batch, "batch") if isinstance(leaf, Tensor) and leaf.ndim}
    if not lengths:
        found = f"no tensor with a sample dimension in a {type(batch).__name__}"
        raise DataError(Problem("batch", found, "Give a mapping, tuple or tensor with samples along dimension 0"))
    if len(set(lengths.values())) > 1:
        found = "tensors of different length: " + ", ".join(f"{path} {length}" for path, length in lengths.items())
        raise DataError(Problem("batch", found, "Give every tensor of a batch one entry per sample along dimension 0"))
    return next(iter(lengths.values()))


def take(batch: Any, indices: Sequence[int] | Tensor) -> Any:
    """The samples of a batch at some positions, in that order; what is not per sample stays as it is."""
    index = torch.as_tensor(indices)
    size = batch_size(batch)

    def select(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.index_select(0, index.to(leaf.device))
        if isinstance(leaf, list) and len(leaf) == size:
            return [leaf[position] for position in index.tolist()]
        return leaf

    return _map(select, batch)


def chunks(batch: Any, size: int | None) -> Iterator[Any]:
    """Consecutive parts of at most `size` samples; the batch itself where that is all of it."""
    total = batch_size(batch)
    if size is None or size >= total:
        yield batch
        return
    for start in range(0, total, size):
        yield take(batch, range(start, min(start + size, total)))


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    return _map(lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, batch)


def _map(function: Any, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {key: _map(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple) or (isinstance(batch, list) and any(isinstance(item, Tensor) for item in batch)):
        return tuple(_map(function, value) for value in batch)
    return function(batch)


def _leaves(batch: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _leaves(value, f"{path}[{key!r}]")
    elif isinstance(batch, tuple | list):
        for position, value in enumerate(batch):
            yield from _leaves(value, f"{path}[{position}]")
    else:
        yield path, batch


class BatchStream:
    """An endless stream of batches from an iterable, with the first ones set aside.

    A re-iterable starts again when it is through, without the batches set aside; an iterator that is exhausted stays
    so. Batches of fewer samples than are needed are passed over, except the first, which is an error.

    Args:
        batches: a re-iterable (DataLoader, list) or an iterator.
        min_samples: the fewest samples a batch must have.
    """

    def __init__(self, batches: Iterable[Any], min_samples: int) -> None:
        self._source = batches
        self._min_samples = min_samples
        self._set_aside = 0
        self._delivered = 0
        self._iterator = self._open()
        self._one_shot = self._iterator is batches

    def set_aside(self, count: int) -> list[Any]:
        """The first `count` batches, which the stream does not deliver again.

        Raises:
            DataError: where there are no more batches than that.
        """
        first: list[Any] = []
        for _ in range(count):
            batch = self._next_large_enough()
            if batch is None:
                found = f"{len(first)} batches, of which {count} are to be held out"
                raise DataError(Problem("batches", found, "Give more data, a smaller holdout_batches, or holdout="))
            first.append(batch)
        self._set_aside = count
        return first

    def next(self) -> Any | None:
        """The next batch, or None once a one-shot iterator is exhausted.

        Raises:
            DataError: where a pass over the data gives no batch.
        """
        batch = self._next_large_enough()
        if batch is None and not self._one_shot:
            self._iterator = self._open()
            for _ in range(self._set_aside):
                self._next_large_enough()
            batch = self._next_large_enough()
        if batch is None and not self._delivered:
            found = "no batch" if not self._set_aside else f"no batch beyond the {self._set_aside} held out"
            raise DataError(Problem("batches", found, "Give more data or a smaller batch or holdout_batches"))
        self._delivered += batch is not None
        return batch

    def _open(self) -> Iterator[Any]:
        self._seen_large_enough = False
        return iter(self._source)

    def _next_large_enough(self) -> Any | None:
        for batch in self._iterator:
            size = batch_size(batch)
            if size >= self._min_samples:
                self._seen_large_enough = True
                return batch
            if not self._seen_large_enough:
                fix = f"Choose 2 to {size} sub-batches or a larger batch"
                raise ConfigError(Problem("sub_batches", f"{self._min_samples} for a batch of {size} samples", fix))
            logger.warning("A batch of %d samples is passed over: fewer than %d sub-batches.", size, self._min_samples)
        return None
