"""Blocks of tokens: documents stand one behind the other and are cut across their ends.

Block i holds the tokens b * i ... b * i + b - 1 of all tokens, b = `block_size`. The last block holds the rest. A rest
of a single token is left out, as it has no token to predict. No other token is lost, and none is repeated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import pyarrow as pa
from torch.utils.data import Dataset, IterableDataset

from nio_hf.errors import DataError, Problem, one_line

TOKENS = "input_ids"
"""Column of the tokens of a document, and key of the tokens of a block."""
LEAST = 2
"""Number of tokens of the shortest block: one to read, one to predict."""
Block = dict[str, list[int]]


class PackedBlocks(Dataset[Block]):
    """Blocks `{"input_ids": list of int}` of documents that are at hand.

    Tokens stay where `datasets` has them: on the disk, for cached ones. A block is read when it is asked for. The copy
    of a worker holds the names of the files only.

    Args:
        rows: Rows with a column `input_ids`, the tokens of each document with the separator. Selected or shuffled rows
            are written anew in their order.
        block_size: Number of tokens of all blocks but the last, at least 2.

    Attributes:
        tokens: Number of tokens in all blocks.
    """

    def __init__(self, rows: datasets.Dataset, block_size: int) -> None:
        rows = rows.select_columns(TOKENS)
        self._rows = rows if rows._indices is None else rows.flatten_indices()
        self._block_size = block_size
        documents = self._rows.data.column(TOKENS)
        parts = [part.flatten() for part in documents.chunks]
        self._all_tokens = pa.chunked_array(parts, type=documents.type.value_type)
        rest = len(self._all_tokens) % block_size
        self.tokens: int = len(self._all_tokens) - (rest if rest < LEAST else 0)

    def __len__(self) -> int:
        return -(-self.tokens // self._block_size)

    def __getitem__(self, index: int) -> Block:
        start = range(0, self.tokens, self._block_size)[index]
        size = min(self._block_size, self.tokens - start)
        return {TOKENS: self._all_tokens.slice(start, size).to_numpy().tolist()}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._rows, self._block_size)


class PackedStream(IterableDataset[Block]):
    """Blocks as in [`PackedBlocks`] from a stream. Each worker packs the documents of its own shards.

    Args:
        rows: Stream with a column `input_ids`.
        block_size: Number of tokens of all blocks but the last of a worker, at least 2.
        part: Name of the part in messages, "train" or "evaluation".
        guard: Function that makes a context around the reading, which may raise a better DataError for an error.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        block_size: int,
        *,
        part: str,
        guard: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._rows = rows
        self._block_size = block_size
        self._part = part
        self._guard = guard

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew, in an order that depends on the seed and the epoch."""
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Block]:
        waiting: list[int] = []
        for document in self._documents():
            waiting += document
            whole = len(waiting) - len(waiting) % self._block_size
            for start in range(0, whole, self._block_size):
                yield {TOKENS: waiting[start : start + self._block_size]}
            del waiting[:whole]
        if len(waiting) >= LEAST:
            yield {TOKENS: waiting}

    def _documents(self) -> Iterator[list[int]]:
        try:
            with self._guard():
                for row in self._rows:
                    yield row[TOKENS]
        except DataError:
            raise
        except Exception as error:  # whatever readers of files and networks raise
            found, fix = f"cannot be read further: {one_line(error)}", "Check the files that it is read from"
            raise DataError(Problem(f"the {self._part} stream", found, fix)) from error
