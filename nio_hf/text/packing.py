"""Blocks of tokens: documents stand one behind the other and are cut across their ends.

Block i holds the tokens b * i ... b * i + b - 1 of all tokens, b = `block_size`. The last block holds what is left. A
rest of a single token is left out, as it has no token to predict. No other token is lost, and none is repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow as pa
from torch.utils.data import Dataset, IterableDataset

from nio_hf.data.sources import Source
from nio_hf.errors import DataError, Problem, one_line
from nio_hf.text.sources import name_undecodable_file

TOKENS = "input_ids"
"""Column of the tokens of a document, and key of those of a block."""
_LEAST = 2
"""Tokens of the shortest block: one to read, one to predict."""


def check_block_size(block_size: int) -> None:
    """Refuse blocks in which there is nothing to predict.

    Raises:
        DataError: for a size below 2.
    """
    if block_size < _LEAST:
        fix = "Give 2 or more: a token is predicted from those before it"
        raise DataError(Problem("block_size", f"{block_size}", fix))


class PackedBlocks(Dataset[dict[str, list[int]]]):
    """Blocks `{"input_ids": list of int}` of documents that are at hand.

    Tokens stay where `datasets` has them, on the disk for what it has cached. A block is read when it is asked for. A
    copy for a worker holds the names of the files only.

    Args:
        rows: with a column `input_ids`, the tokens of each document with the separator. Where rows were selected or
            shuffled, `datasets` writes them anew in their order.
        block_size: tokens of a block, all but the last.

    Raises:
        DataError: for a size below 2.
    """

    def __init__(self, rows: datasets.Dataset, block_size: int) -> None:
        check_block_size(block_size)
        rows = rows.select_columns(TOKENS)
        self._rows = rows if rows._indices is None else rows.flatten_indices()
        self._block_size = block_size
        documents = self._rows.data.column(TOKENS)
        parts = [part.flatten() for part in documents.chunks]
        self._all_tokens = pa.chunked_array(parts, type=documents.type.value_type)
        rest = len(self._all_tokens) % block_size
        self._tokens = len(self._all_tokens) - (rest if rest < _LEAST else 0)

    @property
    def tokens(self) -> int:
        """Number of tokens in all blocks."""
        return self._tokens

    def __len__(self) -> int:
        return -(-self._tokens // self._block_size)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        start = range(0, self._tokens, self._block_size)[index]
        size = min(self._block_size, self._tokens - start)
        return {TOKENS: self._all_tokens.slice(start, size).to_numpy().tolist()}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._rows, self._block_size)


class PackedStream(IterableDataset[dict[str, list[int]]]):
    """Blocks as those of [`PackedBlocks`] from a stream. Each worker packs the documents of its own shards.

    Args:
        rows: a stream with a column `input_ids`.
        block_size: tokens of a block, all but the last of a worker.
        part: name of the part in messages, "train" or "evaluation".
        source: what the stream is read from, for messages.

    Raises:
        DataError: for a size below 2.
    """

    def __init__(self, rows: datasets.IterableDataset, block_size: int, *, part: str, source: Source) -> None:
        check_block_size(block_size)
        self._rows = rows
        self._block_size = block_size
        self._part = part
        self._source = source

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew, in an order that depends on the seed and the epoch."""
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        waiting: list[int] = []
        for document in self._documents():
            waiting += document
            whole = len(waiting) - len(waiting) % self._block_size
            for start in range(0, whole, self._block_size):
                yield {TOKENS: waiting[start : start + self._block_size]}
            del waiting[:whole]
        if len(waiting) >= _LEAST:
            yield {TOKENS: waiting}

    def _documents(self) -> Iterator[list[int]]:
        try:
            with name_undecodable_file(self._source):
                for row in self._rows:
                    yield row[TOKENS]
        except DataError:
            raise
        except Exception as error:  # whatever readers of files and networks raise
            found = f"cannot be read on: {one_line(error)}"
            raise DataError(
                Problem(f"the {self._part} stream", found, "Check the files that it is read from")
            ) from error
