"""Parts of a data set: a split of it, what is set aside to evaluate on, and no more samples than asked for."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import datasets

from nio_hf.data.sources import Rows
from nio_hf.errors import DataError, Problem, one_line

logger = logging.getLogger(__name__)

_VALIDATION_SPLITS = ("validation", "valid", "val")
_DIGESTS = 2**32

Digest = Callable[[dict[str, Any]], int]
"""A function of the content of a sample, evenly spread over [0, 2^32). Workers get a copy, so it can be pickled."""


def choose_split(splits: Mapping[str, Rows], split: str, key: str, name: str) -> Rows:
    """The samples of a split.

    Args:
        splits: all splits by name.
        split: name of the one to choose.
        key: setting that names it, for messages.
        name: of the data set, for messages.

    Raises:
        DataError: for a split that does not exist, cannot be read, or has no samples.
    """
    if split not in splits:
        raise DataError(Problem(key, f"{split!r} is no split of {name}", f"Choose one of {', '.join(splits)}"))
    rows = splits[split]
    try:
        is_empty = len(rows) == 0 if isinstance(rows, datasets.Dataset) else not list(rows.take(1))
    except Exception as error:  # whatever readers of files and networks raise
        found = f"the split {split!r} of {name} cannot be read: {one_line(error)}"
        raise DataError(Problem(key, found, "Check its files")) from error
    if is_empty:
        raise DataError(Problem(key, f"the split {split!r} of {name} is empty", "Give a split with samples"))
    return rows


def name_eval_split(
    splits: Mapping[str, Rows], train_split: str, eval_split: str | None, eval_from_train: bool
) -> str | None:
    """Name of the split to evaluate on; None where a part of the training split takes its place.

    Args:
        splits: all splits by name.
        train_split: split to train on.
        eval_split: split that is asked for; None for the validation split.
        eval_from_train: evaluate on a part of the training split whatever splits there are.
    """
    if eval_from_train:
        return None
    validation = (split for split in _VALIDATION_SPLITS if split in splits and split != train_split)
    return eval_split or next(validation, None)


def set_aside(
    rows: Rows,
    fraction: float,
    *,
    digest: Digest,
    seed: int,
    name: str,
    need: str,
    stratify_by: str | None = None,
) -> tuple[Rows, Rows]:
    """(training part, evaluation part) of a split: a random choice, or for a stream a share by digest.

    Args:
        rows: samples of the split.
        fraction: size of the evaluation part, in (0, 1).
        digest: of a sample of a stream. Samples of a digest below fraction * 2^32 are set aside, so that copies of a
            sample stay together and no order or worker changes the choice.
        seed: of the random choice.
        name: of the data set, for messages.
        need: what the evaluation part needs beside its size, for messages, e.g. "holds a sample of every class".
        stratify_by: column of classes, of each of which the same share is set aside.

    Raises:
        DataError: for a part that is empty or is everything.
    """
    if not 0 < fraction < 1:
        raise DataError(Problem("eval_fraction", f"{fraction}", "Give a part in (0, 1), or an eval_split"))
    logger.info("%s: %g of the training split is set aside to evaluate on.", name, fraction)
    if isinstance(rows, datasets.IterableDataset):
        chosen = _Chosen(digest, fraction)
        return rows.filter(_NotChosen(chosen)), rows.filter(chosen)
    try:
        parts = rows.train_test_split(fraction, seed=seed, stratify_by_column=stratify_by)
    except ValueError as error:
        found = f"{fraction} of {len(rows)} samples of {name} cannot be set aside ({one_line(error)})"
        fix = f"Give a part in (0, 1) that {need}, or an eval_split"
        raise DataError(Problem("eval_fraction", found, fix)) from error
    return parts["train"], parts["test"]


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Whether a sample of a stream is set aside: a function of its content alone."""

    digest: Digest
    fraction: float

    def __call__(self, row: dict[str, Any]) -> bool:
        return self.digest(row) < self.fraction * _DIGESTS


@dataclasses.dataclass(frozen=True)
class _NotChosen:
    chosen: _Chosen

    def __call__(self, row: dict[str, Any]) -> bool:
        return not self.chosen(row)


def limit(rows: Rows, count: int | None, seed: int) -> Rows:
    """At most so many samples: a random choice, or the first ones of a stream; None for all."""
    if count is None:
        return rows
    if isinstance(rows, datasets.IterableDataset):
        return rows.take(count)
    return rows.shuffle(seed=seed).select(range(min(count, len(rows))))
