"""A stream of batches that ends in one known way and keeps its held-out batches to itself."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from nio_hf.core.batches import batch_size, tensors_equal, too_many_sub_batches
from nio_hf.errors import ConfigError, DataError, Problem

logger = logging.getLogger(__name__)


class BatchStream:
    """An endless stream of batches from an iterable, with the first ones set aside.

    A re-iterable starts again when it is through, without the batches set aside: one of known length that is too
    short gives the batches of its first pass again, others are iterated anew. An iterator that is exhausted stays so,
    and so does a re-iterable whose second pass does not begin with the batches set aside. Batches of fewer samples
    than are needed are passed over, except the first, which is an error.

    Args:
        batches: Re-iterable (DataLoader, list) or an iterator.
        min_samples: Fewest samples a batch must have.
        needed: Number of batches that will be asked for.
    """

    def __init__(self, batches: Any, min_samples: int, needed: int) -> None:
        if not isinstance(batches, Iterable):
            fix = "Give a DataLoader, a list of batches, or another iterable of them"
            raise DataError(Problem("batches", f"a {type(batches).__name__}", fix))
        self._source = batches
        self._min_samples = min_samples
        self._held_out: list[Any] = []
        self._first_pass: list[Any] = []
        self._delivered = 0
        self._ended = False
        self._iterator = self._open()
        self._one_shot = self._iterator is batches
        length = _length(batches)
        self._replays = not self._one_shot and length is not None and length < needed

    def set_aside(self, count: int) -> list[Any]:
        """The first `count` batches, which the stream does not deliver again.

        Raises:
            DataError: Where there are no more batches than that.
        """
        for _ in range(count):
            batch = self._next_large_enough()
            if batch is None:
                found = f"{len(self._held_out)} batches, of which {count} are to be reported on"
                fix = "Give more data, smaller batches, or lower NIOConfig.report_batches"
                raise DataError(Problem("batches", found, fix))
            self._held_out.append(batch)
        return self._held_out

    def next(self) -> Any | None:
        """The next batch, or None once there is none that is not held out.

        Raises:
            DataError: Where a pass over the data gives no batch.
        """
        batch = None if self._ended else self._next_large_enough()
        if batch is None and not self._ended:
            self._ended = self._one_shot or not self._restart()
            batch = None if self._ended else self._next_large_enough()
        if batch is None and not self._delivered:
            found = "no batch" if not self._held_out else f"no batch beyond the {len(self._held_out)} of the report"
            raise DataError(
                Problem("batches", found, "Give more data, smaller batches, or lower NIOConfig.report_batches")
            )
        if batch is not None:
            self._delivered += 1
            if self._replays and self._delivered > len(self._first_pass):
                self._first_pass.append(batch)
        return batch

    def _restart(self) -> bool:
        """Begin another pass, unless that would mix held-out samples in."""
        if self._replays and self._first_pass:
            self._iterator = iter(self._first_pass)
            return True
        self._iterator = self._open()
        again = [self._next_large_enough() for _ in self._held_out]
        if all(map(tensors_equal, again, self._held_out)):
            return True
        logger.warning(
            "The data come in another order on the second pass: going on would optimise on held-out samples. Pass "
            "report=, or more data."
        )
        return False

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
                raise ConfigError(too_many_sub_batches(self._min_samples, size))
            logger.warning("A batch of %d samples is passed over: fewer than %d sub-batches.", size, self._min_samples)
        return None


def _length(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:
        return None
