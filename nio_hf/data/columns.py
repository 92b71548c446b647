"""Which column of a data set holds what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import datasets

from nio_hf.data.loading import DataKind, Rows
from nio_hf.errors import DataError, Problem

TEXT_TYPES = ("string", "large_string")
"""Types of a column of texts."""


@dataclasses.dataclass(frozen=True)
class ColumnKind:
    """What tells a column of some content.

    Attributes:
        key: Setting that names the column.
        what: Content of the column, for messages.
        is_one: Test of a type by which a column is known.
        can_be_one: Test of a type whose columns can stand for one.
        usual_names: Names by which such columns are taken unasked.
    """

    key: str
    what: str
    is_one: Callable[[Any], bool]
    can_be_one: Callable[[Any], bool]
    usual_names: tuple[str, ...] = ()


def find_features(rows: Rows, kind: DataKind, name: str) -> datasets.Features:
    """Columns and their types, of a stream if need be from its first samples.

    Raises:
        DataError: Where there are none.
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
        features: Columns of the data set.
        column: Name of the column; None for the only one.
        name: Name of the data set, for messages.
        kind: Kind of the column.
        fix: Cure where there is none; None for the names to choose from.

    Raises:
        DataError: Where there is none, or more than one to choose from.
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
    """The columns with their types, for messages."""
    return ", ".join(f"{column} ({describe_feature(feature)})" for column, feature in features.items())


def describe_feature(feature: Any) -> str:
    """The type of a column, for messages."""
    return f"{feature.dtype}" if isinstance(feature, datasets.Value) else type(feature).__name__
