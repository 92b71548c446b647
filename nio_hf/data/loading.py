"""Data sets from the Hub, local files or the package: their splits, columns, and parts to train and evaluate on."""

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
TEXT_TYPES = ("string", "large_string")
"""Types of a column of texts."""
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
    """Return the splits that [`datasets.load_dataset`] finds, by name, with options of the format. Its errors pass."""
    splits: Mapping[str, Rows] = datasets.load_dataset(
        **load_arguments(settings), streaming=settings.streaming, **options
    )
    return splits


@dataclasses.dataclass(frozen=True)
class DataKind:
    """A kind of data, with the words that messages have for it.

    Attributes:
        contents: Content of the samples, e.g. "images and labels".
        folder: Content of a folder, e.g. "images in one folder per class".
        part: Property of every part beside its size, e.g. "holds a sample of every class".
        formats: Names for `datasets.load_dataset` that need `data_dir` or `data_files`.
        embedded: {name: function that makes the data set}, for data sets that need no download.
        read: Function that reads any other data set. It may raise errors of any type.
        digest: Function from (content, seed) to an integer, evenly spread over [0, 2^32). Workers get a pickled copy.
    """

    contents: str
    folder: str
    part: str
    formats: tuple[str, ...]
    embedded: Mapping[str, Callable[[], datasets.Dataset]]
    read: Callable[[DataSettings], Mapping[str, Rows]]
    digest: Callable[[Any, int], int]


@dataclasses.dataclass(frozen=True)
class ColumnKind:
    """A kind of columns.

    Attributes:
        key: Setting that names the column.
        what: Content of the column, for messages.
        is_one: Test of a type by which a column is known.
        can_be_one: Test of a type that a named column may have.
        usual_names: Names by which columns of such a type are chosen without being named.
    """

    key: str
    what: str
    is_one: Callable[[Any], bool]
    can_be_one: Callable[[Any], bool]
    usual_names: tuple[str, ...] = ()


_OF_OTHER_DATA = ("data_dir", "data_files", "dataset_config_name", "dataset_revision")
"""Settings that no embedded data set has."""


def load_splits(settings: DataSettings, kind: DataKind) -> Mapping[str, Rows]:
    """Load the splits of a data set, by name.

    Raises:
        DataError: Data set that cannot be loaded, with the setting to look at.
    """
    name = cast(str, settings.dataset_name)
    if name in kind.embedded:
        others = [key for key in _OF_OTHER_DATA if getattr(settings, key) is not None]
        if others:
            found = f"given with the data set {name!r}, which has no files"
            fix = f"Leave it out, or give a dataset_name that it belongs to, e.g. {kind.formats[0]}"
            raise DataError(Problem(others[0], found, fix))
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
                where, fix = "data_files", f"Give files that exist and hold {kind.contents}, relative to where you are"
            what, given = getattr(settings, where), f" as {name!r}"
        found = f"{what!r} cannot be loaded{given}: {one_line(error.__cause__ or error)}"
        raise DataError(Problem(where, found, fix)) from error
    if not splits:
        raise DataError(Problem("dataset_name", f"{name!r} has no split", f"Give a data set with {kind.contents}"))
    return splits


def choose_split(splits: Mapping[str, Rows], split: str, key: str, name: str) -> Rows:
    """Return the samples of a split that the setting `key` names, of the data set `name`.

    Raises:
        DataError: Split that does not exist, cannot be read, or has no samples.
    """
    if split not in splits:
        fix = f"Choose one of {', '.join(splits)}"
        if key == "eval_split":
            fix += ", or null, which sets a part of the training split aside"
        raise DataError(Problem(key, f"{split!r} is no split of {name}", fix))
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
    kind: DataKind,
    column: str,
    *,
    prepare: Callable[[Rows, str], Rows],
    seed: int,
    stratify_by: str | None = None,
) -> tuple[Rows, Rows, bool]:
    """Return (training part, evaluation part, whether the evaluation part is a split of its own).

    The evaluation part is `eval_split`, else the validation split. Without one, and with `eval_from_train`, it is a
    part of the training split: a random choice, or of a stream the samples whose digest is below eval_fraction * 2^32.
    Copies of a sample in a stream stay together, and no order or worker changes the choice.

    Args:
        splits: All splits by name.
        train: Samples of the training split.
        settings: Settings of the data set.
        kind: Kind of the data.
        column: Column that the digest is taken of.
        prepare: Function from (samples of another split, its name) to these samples, checked.
        seed: Seed of the choice.
        stratify_by: Column of classes, of each of which the same share is set aside.

    Raises:
        DataError: Part that is empty or is everything.
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
        limit = fraction * _DIGESTS
        kept, chosen = (
            functools.partial(_is_in_part, kind.digest, column, seed, limit, side) for side in (False, True)
        )
        return train.filter(kept), train.filter(chosen), False
    try:
        parts = train.train_test_split(fraction, seed=seed, stratify_by_column=stratify_by)
    except ValueError as error:
        found = f"{fraction} of {len(train)} samples of {name} cannot be set aside ({one_line(error)})"
        fix = f"Give a part in (0, 1) that {kind.part}, or an eval_split"
        raise DataError(Problem("eval_fraction", found, fix)) from error
    return parts["train"], parts["test"], False


def _is_in_part(
    digest: Callable[[Any, int], int], column: str, seed: int, limit: float, is_chosen: bool, row: dict[str, Any]
) -> bool:
    return (digest(row[column], seed) < limit) is is_chosen


def limit_rows(rows: Rows, count: int | None, seed: int) -> Rows:
    """Return at most `count` samples: a random choice, or the first ones of a stream; None for all."""
    if count is None:
        return rows
    if isinstance(rows, datasets.IterableDataset):
        return rows.take(count)
    return rows.shuffle(seed=seed).select(range(min(count, len(rows))))


def find_features(rows: Rows, kind: DataKind, name: str) -> datasets.Features:
    """Return the columns with their types, of a stream if need be from its first samples.

    Raises:
        DataError: Data set without columns.
    """
    features = rows.features
    if features is None and isinstance(rows, datasets.IterableDataset):
        features = rows._resolve_features().features
    if not features:
        raise DataError(Problem("dataset_name", f"{name} has no columns", f"Give a data set of {kind.contents}"))
    return features


def find_column(
    features: datasets.Features, column: str | None, name: str, kind: ColumnKind, fix: str | None = None
) -> str:
    """Return the column of a kind: the named one, or the only one that can be meant.

    `name` is the data set in messages, `fix` the advice where there is no column; None lists the columns.

    Raises:
        DataError: No column, or more than one to choose from.
    """
    columns = describe_columns(features)
    if column is not None:
        if column not in features:
            raise DataError(Problem(kind.key, f"{column!r} is no column of {name}", f"Name one of {columns}"))
        if not kind.is_one(features[column]) and not kind.can_be_one(features[column]):
            found = f"{column!r} of {name} holds {describe_feature(features[column])}"
            raise DataError(Problem(kind.key, found, f"Name a column of {kind.what}: {columns}"))
        return column
    of_type: list[str] = [key for key, feature in features.items() if kind.is_one(feature)]
    candidates = of_type or [k for k in kind.usual_names if k in features and kind.can_be_one(features[k])]
    if len(candidates) == 1:
        return candidates[0]
    if candidates or fix is None:
        fix = f"Name one of its columns: {columns}"
    raise DataError(Problem(kind.key, f"{len(candidates) or 'no'} columns of {kind.what} in {name}", fix))


def describe_columns(features: datasets.Features) -> str:
    """Columns with their types, for messages."""
    return ", ".join(f"{column} ({describe_feature(feature)})" for column, feature in features.items())


def describe_feature(feature: Any) -> str:
    """Type of a column, for messages."""
    return f"{feature.dtype}" if isinstance(feature, datasets.Value) else type(feature).__name__
