"""Text data sets: a training and an evaluation part, tokenised and packed into blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import datasets
from datasets.utils.extract import Extractor
from transformers import PreTrainedTokenizerBase

from nio_hf.data.loading import (
    TEXT_TYPES,
    ColumnKind,
    DataKind,
    Rows,
    choose_split,
    divide,
    find_column,
    find_features,
    limit_rows,
    load_arguments,
    load_splits,
    read_splits,
)
from nio_hf.errors import DataError, Problem
from nio_hf.recipe.settings import DataSettings
from nio_hf.text.packing import LEAST, TOKENS, PackedBlocks, PackedStream
from nio_hf.text.stdlib import NAME, stdlib
from nio_hf.text.tokenizers import encode_texts, separator_of

logger = logging.getLogger(__name__)

Blocks = PackedBlocks | PackedStream
"""Blocks of tokens, all at hand or as a stream."""

_TEXT = "text"
"""Name of the format of plain text in `datasets`, and usual name of a column of texts."""
_FORMATS = (_TEXT, "json", "csv", "parquet")
_STREAM_BATCH = 100
"""Number of documents of a stream that are tokenised at once."""


def _read_texts(settings: DataSettings) -> Mapping[str, Rows]:
    """Read the splits of a data set. A file of plain text is one document."""
    name = settings.dataset_name
    is_plain = name == _TEXT or (
        name not in _FORMATS and datasets.load_dataset_builder(**load_arguments(settings)).name == _TEXT
    )
    return read_splits(settings, **({"sample_by": "document"} if is_plain else {}))


def _holds_texts(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in TEXT_TYPES


def _digest_text(text: str | None, seed: int) -> int:
    return zlib.crc32((text or "").encode(errors="surrogatepass"), seed)


TEXTS = DataKind(
    contents="texts",
    folder="text files",
    part="leaves a document on either side: a file of plain text is one",
    formats=_FORMATS,
    embedded={NAME: stdlib},
    read=_read_texts,
    digest=_digest_text,
)
"""Documents of text."""
_COLUMN = ColumnKind("text_column", "texts", _holds_texts, _holds_texts)


@dataclasses.dataclass(frozen=True)
class TextData:
    """A data set of texts, as blocks of tokens.

    Attributes:
        train: Blocks to train on.
        evaluation: Blocks of other documents to evaluate on, unless the settings name one split for both.
        tokenizer: Tokeniser of the texts.
        is_split: Whether the documents to evaluate on are a split of their own, and no part of the training split.
    """

    train: Blocks
    evaluation: Blocks
    tokenizer: PreTrainedTokenizerBase
    is_split: bool


def load_text_data(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    text_column: str | None = None,
    num_proc: int | None = None,
    seed: int = 0,
) -> TextData:
    """Load a data set of texts, as blocks of tokens. A file of plain text is one document.

    A limit of samples takes a random choice of the documents, or the first ones of a stream.

    Args:
        settings: Settings of the data set; its name is "stdlib", or a name that [`datasets.load_dataset`] takes.
        tokenizer: Tokeniser of the texts.
        block_size: Number of tokens of a block.
        text_column: Column of texts; None for the column called "text", or the only column of texts.
        num_proc: Number of processes that tokenise; None for this process. Streams are tokenised where they are read.
        seed: Seed of all random choices.

    Raises:
        DataError: Data set that cannot be loaded, is not UTF-8, or has no such split or column; part without texts or
            with fewer than two tokens; block size below 2.
        ModelError: Tokeniser without a token that can stand behind a document.
    """
    if block_size < LEAST:
        fix = f"Give {LEAST} or more: a token is predicted from those before it"
        raise DataError(Problem("block_size", f"{block_size}", fix))
    name = cast(str, settings.dataset_name)
    with name_undecodable_file(settings):
        splits = load_splits(settings, TEXTS)
        train = choose_split(splits, settings.train_split, "train_split", name)
        column = find_text_column(train, text_column, name)

        def prepare(rows: Rows, split: str) -> Rows:
            find_text_column(rows, column, name)
            return rows

        train, evaluation, is_split = divide(splits, train, settings, TEXTS, column, prepare=prepare, seed=seed)
        train = limit_rows(train, settings.max_train_samples, seed)
        # A split of its own is evaluated on the same documents in every run.
        evaluation = limit_rows(evaluation, settings.max_eval_samples, 0 if is_split else seed)
        for rows, part in ((train, "training"), (evaluation, "evaluation")):
            _check_texts(rows, column, f"the {part} part of {name}")
    if isinstance(train, datasets.IterableDataset):
        train = train.shuffle(seed=seed, buffer_size=settings.shuffle_buffer_size)
    tokenise = functools.partial(_tokenise, tokenizer, separator_of(tokenizer), column)

    def pack(rows: Rows, part: str) -> Blocks:
        rows, options = rows.select_columns(column), {"batched": True, "remove_columns": [column]}
        if isinstance(rows, datasets.IterableDataset):
            tokenised = rows.map(tokenise, batch_size=_STREAM_BATCH, **options)
            guard = functools.partial(name_undecodable_file, settings)
            return PackedStream(tokenised, block_size, part=part, guard=guard)
        features = datasets.Features({TOKENS: datasets.List(datasets.Value("int32"))})
        tokenised = rows.map(tokenise, features=features, num_proc=num_proc, desc="Tokenising", **options)
        blocks, empty = PackedBlocks(tokenised, block_size), len(rows) - len(tokenised)
        if not blocks.tokens:
            found = f"{len(rows)} documents of the {part} part give no two tokens together"
            raise DataError(Problem("text_column", found, "Give documents whose texts the tokenizer has tokens for"))
        if empty:
            logger.info("%d of %d documents of the %s part are empty: passed over.", empty, len(rows), part)
        return blocks

    return TextData(pack(train, "train"), pack(evaluation, "evaluation"), tokenizer, is_split)


def find_text_column(rows: Rows, column: str | None, name: str) -> str:
    """Return the column of texts: the named one, the one called "text", or the only one of that type.

    Raises:
        DataError: No column of texts, or more than one to choose from.
    """
    features = find_features(rows, TEXTS, name)
    if column is None and _holds_texts(features.get(_TEXT)):
        return _TEXT
    return find_column(features, column, name, _COLUMN)


def _check_texts(rows: Rows, column: str, part: str) -> None:
    """Refuse documents that are all empty. Documents are read up to the first with a text."""
    count = 0
    for row in rows.select_columns(column):
        if row[column]:
            return
        count += 1
    if not count:
        fix = "Give another fraction, more documents, or an eval_split"
        raise DataError(Problem("eval_fraction", f"no document is in {part}", fix))
    found = f"{column!r} holds only empty texts in {part}, {count} of them"
    raise DataError(Problem("text_column", found, "Name a column with texts, or give documents that have some"))


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, separator: int, column: str, batch: dict[str, list[str | None]]
) -> dict[str, list[list[int]]]:
    """Tokens of documents, each with the separator behind it. Documents without a token are passed over."""
    texts = [text for text in batch[column] if text]
    encoded = encode_texts(tokenizer, texts) if texts else []
    return {TOKENS: [[*tokens, separator] for tokens in encoded if tokens]}


@contextlib.contextmanager
def name_undecodable_file(settings: DataSettings) -> Iterator[None]:
    """Turn errors of decoding UTF-8 into a DataError that names the local file and the byte. Other errors pass."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UnicodeDecodeError):
            cause = cause.__cause__ or cause.__context__
        problem = None if cause is None else _undecodable_problem(settings)
        if problem is None:
            raise
        raise DataError(problem) from error


def _undecodable_problem(settings: DataSettings) -> Problem | None:
    """Problem of the first local file that is not UTF-8; None without such a file."""
    files = datasets.load_dataset_builder(**load_arguments(settings)).config.data_files or {}
    where = next(key for key in ("data_files", "data_dir", "dataset_name") if getattr(settings, key) is not None)
    for file in (Path(name) for names in files.values() for name in names):
        if not file.is_file() or Extractor.infer_extractor_format(file) is not None:
            continue
        start = 0
        with file.open("rb") as lines:
            for line in lines:
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    found = f"{file} is not UTF-8: it cannot be decoded at byte {start + error.start}, counted from 0"
                    return Problem(where, found, "Convert the file to UTF-8, or leave it out")
                start += len(line)
    return None
