"""Splits of a data set, from the Hub, local files or embedded ones, and the parts of it to train and evaluate on."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import datasets

from nio_hf.errors import DataError, Problem, one_line
from nio_hf.recipe.settings import DataSettings

logger = logging.getLogger(__name__)

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset
"""Samples of a split: all of them at hand, or a stream."""
Digest = Callable[[dict[str, Any]], int]
"""Function of the content of a sample, evenly spread over [0, 2^32). Workers get a copy, so it can be pickled."""

_VALIDATION_SPLITS = ("validation", "valid", "val")
_DIGESTS = 2**32


def load_arguments(settings: DataSettings) -> dict[str, Any]:
    """Arguments of [`datasets.load_dataset_builder`]."""
    return {
        "path": settings.dataset_name,
        "name": settings.dataset_config_name,
        "revision": settings.dataset_revision,
        "data_dir": settings.data_dir,
        "data_files": settings.data_files,
    }


def read_splits(settings: DataSettings, **options: Any) -> Mapping[str, Rows]:
    """The splits that [`datasets.load_dataset`] finds, by name; `options` are of their format. Its errors pass."""
    splits: Mapping[str, Rows] = datasets.load_dataset(
        **load_arguments(settings), streaming=settings.streaming, **options
    )
    return splits


@dataclasses.dataclass(frozen=True)
class DataKind:
    """The kind of samples, and the words that messages have for them.

    Attributes:
        contents: Content of a data set, e.g. "images".
        columns: Content of its columns, e.g. "images and labels".
        files: Property that its files must have, e.g. "exist".
        folder: Content of a folder, e.g. "images in one folder per class".
        formats: Names for `datasets.load_dataset` that need `data_dir` or `data_files`.
        embedded: {name: function that makes the data set}, of data sets that need no download.
        read: Function that reads any other data set. It may raise errors of any type.
    """

    contents: str
    columns: str
    files: str
    folder: str
    formats: tuple[str, ...]
    embedded: Mapping[str, Callable[[], datasets.Dataset]]
    read: Callable[[DataSettings], Mapping[str, Rows]] = read_splits


def load_splits(settings: DataSettings, kind: DataKind) -> Mapping[str, Rows]:
    """The splits of a data set, by name.

    Raises:
        DataError: For a data set that cannot be loaded, with the setting to look at.
    """
    name = cast(str, settings.dataset_name)
    if name in kind.embedded:
        rows = kind.embedded[name]()
        return {"train": rows.to_iterable_dataset() if settings.streaming else rows}
    if name in kind.formats and settings.data_dir is None and settings.data_files is None:
        found = f"{name!r} without data_dir or data_files"
        raise DataError(Problem("dataset_name", found, "Give one of them with it"))
    try:
        splits = kind.read(settings)
    except DataError:
        raise
    except Exception as error:  # `datasets` hands on what readers of files and networks raise
        where, given, what = "dataset_name", "", name
        embedded, formats = ", ".join(map(repr, kind.embedded)), ", ".join(kind.formats)
        fix = f"Give {embedded}, the name of a data set on the Hub, a local folder, or {formats}"
        if name in kind.formats:
            where, fix = "data_dir", f"Give a folder with {kind.folder}"
            if settings.data_files is not None:
                where, fix = "data_files", f"Give files that {kind.files}, relative to where you are"
            what, given = getattr(settings, where), f" as {name!r}"
        found = f"{what!r} cannot be loaded{given}: {one_line(error.__cause__ or error)}"
        raise DataError(Problem(where, found, fix)) from error
    if not splits:
        raise DataError(Problem("dataset_name", f"{name!r} has no split", f"Give a data set with {kind.contents}"))
    return splits


def choose_split(splits: Mapping[str, Rows], split: str, key: str, name: str) -> Rows:
    """The samples of a split that the setting `key` names, of the data set `name`.

    Raises:
        DataError: For a split that does not exist, cannot be read, or has no samples.
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


def divide(
    splits: Mapping[str, Rows],
    train: Rows,
    settings: DataSettings,
    *,
    prepare: Callable[[Rows, str], Rows],
    digest: Digest,
    need: str,
    seed: int,
    stratify_by: str | None = None,
) -> tuple[Rows, Rows, bool]:
    """(training part, evaluation part, whether the evaluation part is a split of its own).

    The evaluation part is `eval_split`, else the validation split. Without one, and with `eval_from_train`, it is a
    part of the training split: a random choice, or of a stream the samples of a digest below eval_fraction * 2^32, so
    that copies of a sample stay together and no order or worker changes the choice.

    Args:
        splits: All splits by name.
        train: Samples of the training split.
        settings: Settings of the data set.
        prepare: (samples, name of the split) -> samples; it checks a split of its own.
        digest: Digest of a sample of a stream.
        need: Property that the evaluation part needs beside its size, for messages.
        seed: Seed of the random choice.
        stratify_by: Column of classes, of each of which the same share is set aside.

    Raises:
        DataError: For a part that is empty or is everything.
    """
    name, fraction = cast(str, settings.dataset_name), settings.eval_fraction
    own = (split for split in _VALIDATION_SPLITS if split in splits and split != settings.train_split)
    eval_split = None if settings.eval_from_train else settings.eval_split or next(own, None)
    if eval_split is not None:
        return train, prepare(choose_split(splits, eval_split, "eval_split", name), eval_split), True
    if not 0 < fraction < 1:
        raise DataError(Problem("eval_fraction", f"{fraction}", "Give a part in (0, 1), or an eval_split"))
    logger.info("%s: %g of the training split is set aside to evaluate on.", name, fraction)
    if isinstance(train, datasets.IterableDataset):
        kept, chosen = (functools.partial(_is_in_part, digest, fraction * _DIGESTS, side) for side in (False, True))
        return train.filter(kept), train.filter(chosen), False
    try:
        parts = train.train_test_split(fraction, seed=seed, stratify_by_column=stratify_by)
    except ValueError as error:
        found = f"{fraction} of {len(train)} samples of {name} cannot be set aside ({one_line(error)})"
        fix = f"Give a part in (0, 1) that {need}, or an eval_split"
        raise DataError(Problem("eval_fraction", found, fix)) from error
    return parts["train"], parts["test"], False


def _is_in_part(digest: Digest, limit: float, is_chosen: bool, row: dict[str, Any]) -> bool:
    return (digest(row) < limit) is is_chosen


def limit_rows(rows: Rows, count: int | None, seed: int) -> Rows:
    """At most so many samples: a random choice, or the first ones of a stream; None for all."""
    if count is None:
        return rows
    if isinstance(rows, datasets.IterableDataset):
        return rows.take(count)
    return rows.shuffle(seed=seed).select(range(min(count, len(rows))))
