"""Which column of a data set holds what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import datasets

from nio_hf.data.sources import DataKind, Rows
from nio_hf.errors import DataError, Problem

TEXT_TYPES = ("string", "large_string")
"""Types of a column of texts."""


@dataclasses.dataclass(frozen=True)
class ColumnKind:
    """What tells a column of some content.

    Attributes:
        key: setting that names it.
        what: what it holds, for messages.
        is_one: whether a column is known by its type.
        can_be_one: whether a column of another type can stand for one.
        usual_names: of such columns that are taken unasked.
    """

    key: str
    what: str
    is_one: Callable[[Any], bool]
    can_be_one: Callable[[Any], bool]
    usual_names: tuple[str, ...] = ()


def find_features(rows: Rows, kind: DataKind, name: str) -> datasets.Features:
    """Columns and their types, of a stream if need be from its first samples.

    Raises:
        DataError: where there are none.
    """
    features = rows.features
    if features is None and isinstance(rows, datasets.IterableDataset):
        features = rows._resolve_features().features
    if not features:
        raise DataError(Problem("dataset_name", f"{name} has no columns", f"Give a data set of {kind.columns}"))
    return features


def find_column(
    features: datasets.Features, column: str | None, name: str, kind: ColumnKind, fix: str | None = None
) -> str:
    """The column of a kind: the one that is named, or the only one that can be meant.

    Args:
        features: the columns.
        column: the one that is named; None for the only one.
        name: of the data set, for messages.
        kind: what tells the column.
        fix: what to do where there is none; None for the names to choose from.

    Raises:
        DataError: where there is none, or more than one to choose from.
    """
    if column is not None:
        return _checked(column, features, name, kind)
    of_type = [key for key, feature in features.items() if kind.is_one(feature)]
    called_so = [key for key in kind.usual_names if key in features and kind.can_be_one(features[key])]
    candidates = of_type or called_so
    if len(candidates) == 1:
        return candidates[0]
    if candidates or fix is None:
        fix = f"Name one of its columns: {describe_columns(features)}"
    raise DataError(Problem(kind.key, f"{len(candidates) or 'no'} columns of {kind.what} in {name}", fix))


def _checked(column: str, features: datasets.Features, name: str, kind: ColumnKind) -> str:
    if column not in features:
        fix = f"Name one of {describe_columns(features)}"
        raise DataError(Problem(kind.key, f"{column!r} is no column of {name}", fix))
    if not kind.is_one(features[column]) and not kind.can_be_one(features[column]):
        found = f"{column!r} of {name} holds {describe_feature(features[column])}"
        raise DataError(Problem(kind.key, found, f"Name a column of {kind.what}: {describe_columns(features)}"))
    return column


def describe_columns(features: datasets.Features) -> str:
    """The columns with their types, for messages."""
    return ", ".join(f"{column} ({describe_feature(feature)})" for column, feature in features.items())


def describe_feature(feature: Any) -> str:
    """The type of a column, for messages."""
    if isinstance(feature, datasets.Value):
        return str(feature.dtype)
    return type(feature).__name__
