"""Text data sets: a training and an evaluation part, tokenised and packed into blocks."""

from __future__ import annotations

import dataclasses
import logging
import zlib
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from nio_hf.data.parts import choose_split, limit, name_eval_split, set_aside
from nio_hf.data.sources import Rows, Source, load_splits
from nio_hf.errors import DataError, Problem
from nio_hf.text.packing import TOKENS, PackedBlocks, PackedStream, check_block_size
from nio_hf.text.sources import TEXTS, find_text_column, name_undecodable_file
from nio_hf.text.tokenizers import encode_texts, separator_of

logger = logging.getLogger(__name__)

Blocks = PackedBlocks | PackedStream
"""Blocks of tokens: all of them at hand, or a stream."""

_STREAM_BATCH = 100
"""Documents of a stream that are tokenised at once."""


@dataclasses.dataclass(frozen=True)
class TextData:
    """A data set of texts, as blocks of tokens.

    Attributes:
        train: blocks to train on.
        evaluation: blocks to evaluate on; none of their documents is in `train`, unless both splits are the same by
            request.
        tokenizer: that the tokens are of.
        text_column: name of the column of texts.
        is_split: whether the documents to evaluate on are a split of their own, and no part of the training split.
        empty_documents: number of documents without a token, which are passed over; None for a stream, which passes
            over them uncounted.
    """

    train: Blocks
    evaluation: Blocks
    tokenizer: PreTrainedTokenizerBase
    text_column: str
    is_split: bool
    empty_documents: int | None


def load_text_data(
    name: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    config_name: str | None = None,
    revision: str | None = None,
    data_dir: str | None = None,
    data_files: Any = None,
    streaming: bool = False,
    shuffle_buffer_size: int = 1000,
    train_split: str = "train",
    eval_split: str | None = None,
    eval_fraction: float = 0.2,
    eval_from_train: bool = False,
    text_column: str | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    num_proc: int | None = None,
    seed: int = 0,
) -> TextData:
    """Load a data set of texts, as blocks of tokens.

    Args:
        name: "stdlib", or what [`datasets.load_dataset`] takes. A file of plain text is one document.
        tokenizer: of the texts.
        block_size: tokens of a block.
        config_name: configuration of the data set.
        revision: of a data set on the Hub.
        data_dir: folder in the data set, or of the files.
        data_files: files as a pattern, a list of them, or a mapping from splits.
        streaming: read while training, without downloading or tokenising everything.
        shuffle_buffer_size: documents that the training stream is shuffled over.
        train_split: split to train on.
        eval_split: split to evaluate on; None for the validation split, and where there is none a part of the training
            split: a random choice of its documents, or for a stream a share by digest, which no order or worker
            changes.
        eval_fraction: size of that part, in (0, 1).
        eval_from_train: evaluate on that part whatever splits there are.
        text_column: None for the column called "text", or the only column of texts.
        max_train_samples: use at most so many documents to train on, a random choice unless they are a stream.
        max_eval_samples: likewise to evaluate on.
        num_proc: processes that tokenise; None for this one. Streams are tokenised where they are read.
        seed: of all random choices.

    Raises:
        DataError: for a data set that cannot be loaded or is not UTF-8, a split or column that it does not have, one
            without texts, fewer than two tokens, or a block size below 2.
        ModelError: for a tokenizer without a token that can stand behind a document.
    """
    check_block_size(block_size)
    source = Source(name, config_name, revision, data_dir, data_files, streaming)
    with name_undecodable_file(source):
        splits = load_splits(source, TEXTS)
        train = choose_split(splits, train_split, "train_split", name)
        text_column = find_text_column(train, text_column, name)
        eval_split = name_eval_split(splits, train_split, eval_split, eval_from_train)
        if eval_split is None:
            digest = _TextDigest(text_column, seed)
            need = "leaves a document on either side: a file of plain text is one"
            train, evaluation = set_aside(train, eval_fraction, digest=digest, seed=seed, name=name, need=need)
        else:
            evaluation = choose_split(splits, eval_split, "eval_split", name)
            find_text_column(evaluation, text_column, name)
        train, evaluation = limit(train, max_train_samples, seed), limit(evaluation, max_eval_samples, seed)
        _check_texts(train, text_column, f"the training part of {name}")
        _check_texts(evaluation, text_column, f"the evaluation part of {name}")
    if isinstance(train, datasets.IterableDataset):
        train = train.shuffle(seed=seed, buffer_size=shuffle_buffer_size)
    tokenise = _Tokenise(tokenizer, separator_of(tokenizer), text_column)
    packer = _Packer(tokenise, block_size, num_proc, source)
    trained, empty = packer.pack(train, "train")
    evaluated, more = packer.pack(evaluation, "evaluation")
    empty_documents = None if empty is None or more is None else empty + more
    return TextData(trained, evaluated, tokenizer, text_column, eval_split is not None, empty_documents)


@dataclasses.dataclass(frozen=True)
class _TextDigest:
    """The digest of the text of a document."""

    text_column: str
    seed: int

    def __call__(self, row: dict[str, Any]) -> int:
        return zlib.crc32((row[self.text_column] or "").encode(errors="surrogatepass"), self.seed)


def _check_texts(rows: Rows, text_column: str, part: str) -> None:
    """Refuse documents that are all empty. Of others no more are read than it takes to find a text."""
    count = 0
    for row in rows.select_columns(text_column):
        if row[text_column]:
            return
        count += 1
    if not count:
        fix = "Give another fraction, more documents, or an eval_split"
        raise DataError(Problem("eval_fraction", f"no document is in {part}", fix))
    found = f"{text_column!r} holds only empty texts in {part}, {count} of them"
    raise DataError(Problem("text_column", found, "Name a column with texts, or give documents that have some"))


@dataclasses.dataclass(frozen=True)
class _Tokenise:
    """The tokens of documents, each with the separator behind it. Documents without a token are passed over."""

    tokenizer: PreTrainedTokenizerBase
    separator: int
    text_column: str

    def __call__(self, batch: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
        texts = [text for text in batch[self.text_column] if text]
        encoded = encode_texts(self.tokenizer, texts) if texts else []
        return {TOKENS: [[*tokens, self.separator] for tokens in encoded if tokens]}


@dataclasses.dataclass(frozen=True)
class _Packer:
    """What makes blocks of documents."""

    tokenise: _Tokenise
    block_size: int
    num_proc: int | None
    source: Source

    def pack(self, rows: Rows, part: str) -> tuple[Blocks, int | None]:
        """(blocks, number of documents that are passed over) of a part; None for that of a stream."""
        texts = rows.select_columns(self.tokenise.text_column)
        options: dict[str, Any] = {"batched": True, "remove_columns": [self.tokenise.text_column]}
        if isinstance(texts, datasets.IterableDataset):
            tokenised = texts.map(self.tokenise, batch_size=_STREAM_BATCH, **options)
            return PackedStream(tokenised, self.block_size, part=part, source=self.source), None
        features = datasets.Features({TOKENS: datasets.List(datasets.Value("int32"))})
        tokenised = texts.map(self.tokenise, features=features, num_proc=self.num_proc, desc="Tokenising", **options)
        blocks = PackedBlocks(tokenised, self.block_size)
        if not blocks.tokens:
            found = f"{len(texts)} documents of the {part} part give no two tokens together"
            raise DataError(Problem("text_column", found, "Give documents whose texts the tokenizer has tokens for"))
        empty = len(texts) - len(tokenised)
        if empty:
            logger.info("%d of %d documents of the %s part are empty: passed over.", empty, len(texts), part)
        return blocks, empty
