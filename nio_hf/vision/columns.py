"""Which column holds the images and which the labels, and what the labels mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np

from nio_hf.errors import DataError, Problem, one_line
from nio_hf.vision.sources import Rows

_LABEL_NAMES = ("label", "labels", "cls", "class")
"""Columns that hold labels by common use, where none has the type; "cls" is that of webdataset."""

_TEXT = ("string", "large_string")


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What tells a column of images or of labels.

    Attributes:
        key: setting that names it.
        what: what it holds, for messages.
        feature_type: of a column that is known by its type.
        holds: whether a column of another type can stand for one.
        usual_names: of such columns that are taken unasked.
    """

    key: str
    what: str
    feature_type: type
    holds: Callable[[Any], bool]
    usual_names: tuple[str, ...] = ()


def find_image_column(rows: Rows, column: str | None, name: str) -> str:
    """The column of images: the one that is named, or the only one of that type.

    Raises:
        DataError: where there is none, or more than one to choose from.
    """
    return _find(rows, column, name, _Kind("image_column", "images", datasets.Image, _holds_files))


def find_label_column(rows: Rows, column: str | None, name: str) -> str:
    """The column of labels: the one that is named, the only one of that type, or one that is called so.

    Raises:
        DataError: where there is none, or more than one to choose from.
    """
    return _find(
        rows, column, name, _Kind("label_column", "class labels", datasets.ClassLabel, _holds_labels, _LABEL_NAMES)
    )


def classes_of(rows: Rows, label_column: str, num_classes: int | None, name: str) -> tuple[str, ...]:
    """Names of the classes, in the order of their labels: as the data set has them, or as its labels are.

    Raises:
        DataError: where they cannot be known.
    """
    feature = _features(rows, name)[label_column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    if num_classes is not None:
        return tuple(map(str, range(num_classes)))
    if isinstance(rows, datasets.IterableDataset):
        found = f"{label_column!r} of {name} holds {_described(feature)}, and a stream is not read beforehand"
        fix = "Turn streaming off" if feature.dtype in _TEXT else "Set num_classes, or turn streaming off"
        raise DataError(Problem("num_classes", found, fix))
    values = _values(rows, label_column)
    return tuple(sorted(values)) if feature.dtype in _TEXT else tuple(map(str, range(max(values) + 1)))


def with_classes(rows: Rows, label_column: str, class_names: tuple[str, ...], name: str) -> Rows:
    """The samples of a split with labels of these classes.

    Args:
        rows: the samples.
        label_column: name of the column of labels.
        class_names: in the order of their labels.
        name: of the split and its data set, for messages.

    Raises:
        DataError: for a label that is none of them.
    """
    feature = _features(rows, name)[label_column]
    wanted = datasets.ClassLabel(names=list(class_names))
    if isinstance(feature, datasets.ClassLabel):
        if tuple(feature.names) != class_names:
            found = "other classes than those of the training split, or in another order"
            raise DataError(Problem(name, found, "Give two splits of the same classes"))
        return rows
    where, fix = f"{label_column} of {name}", "Correct it, or num_classes"
    if isinstance(rows, datasets.Dataset) and feature.dtype not in _TEXT:
        largest = max(_values(rows, label_column))
        if largest >= len(class_names):
            found = f"a label that is none of the {len(class_names)} classes: {largest}, counted from 0"
            raise DataError(Problem(where, found, fix))
    try:
        if feature.dtype in _TEXT:
            # Some releases turn only one of the two types of text into classes.
            rows = rows.cast_column(label_column, datasets.Value("string"))
        return rows.cast_column(label_column, wanted)
    except (ValueError, KeyError) as error:
        found = f"a label that is none of the {len(class_names)} classes ({one_line(error)})"
        raise DataError(Problem(where, found, fix)) from error


def _values(rows: datasets.Dataset, label_column: str) -> list[Any]:
    """The labels that occur."""
    return [value for value in rows.unique(label_column) if value is not None]


def check_labels(rows: Rows, label_column: str, name: str) -> None:
    """Refuse samples without a label: none at all, or -1 as test splits often have. A stream shows them as it is read.

    Raises:
        DataError: with their number.
    """
    if isinstance(rows, datasets.IterableDataset):
        return
    labels = rows.with_format("arrow")[label_column][:]
    given = labels.drop_null().to_numpy()
    missing = labels.null_count + (np.count_nonzero(given < 0) if given.dtype.kind == "i" else 0)
    if missing:
        found = f"{missing} of {len(labels)} samples have no label"
        raise DataError(Problem(f"{label_column} of {name}", found, "Choose a split whose samples have labels"))


def without_decoding(rows: Rows, image_column: str) -> Rows:
    """The samples with images as they are stored, so that a broken one can be told and passed over."""
    return rows.cast_column(image_column, datasets.Image(decode=False))


def _features(rows: Rows, name: str) -> datasets.Features:
    features = rows.features
    if features is None and isinstance(rows, datasets.IterableDataset):
        features = rows._resolve_features().features
    if not features:
        raise DataError(Problem("dataset_name", f"{name} has no columns", "Give a data set of images and labels"))
    return features


def _holds_files(feature: Any) -> bool:
    """Whether a column of another type holds encoded images or their paths."""
    if isinstance(feature, dict):
        return {"bytes", "path"} <= feature.keys()
    return getattr(feature, "dtype", None) in (*_TEXT, "binary", "large_binary")


def _holds_labels(feature: Any) -> bool:
    dtype = str(getattr(feature, "dtype", None))
    return isinstance(feature, datasets.Value) and (dtype in _TEXT or dtype.startswith(("int", "uint")))


def _find(rows: Rows, column: str | None, name: str, kind: _Kind) -> str:
    """The column of a kind: the one that is named, or the only one that can be meant."""
    features = _features(rows, name)
    if column is not None:
        return _checked(column, features, name, kind)
    of_type = [key for key, feature in features.items() if isinstance(feature, kind.feature_type)]
    called_so = [key for key in kind.usual_names if key in features and kind.holds(features[key])]
    candidates = of_type or called_so
    if len(candidates) == 1:
        return candidates[0]
    fix = f"Name one of its columns: {_listed(features)}"
    if name == "imagefolder" and kind.feature_type is datasets.ClassLabel and not candidates:
        fix = "Put the images of each class into a folder of their own"
        if len(features) > 1:
            fix = (
                "Its metadata files replace the names of folders: add a column label to them, name one with "
                f"label_column, or remove them. Their columns are {_listed(features)}"
            )
    raise DataError(Problem(kind.key, f"{len(candidates) or 'no'} columns of {kind.what} in {name}", fix))


def _checked(column: str, features: datasets.Features, name: str, kind: _Kind) -> str:
    if column not in features:
        raise DataError(Problem(kind.key, f"{column!r} is no column of {name}", f"Name one of {_listed(features)}"))
    if not isinstance(features[column], kind.feature_type) and not kind.holds(features[column]):
        found = f"{column!r} of {name} holds {_described(features[column])}"
        raise DataError(Problem(kind.key, found, f"Name a column of {kind.what}: {_listed(features)}"))
    return column


def _listed(features: datasets.Features) -> str:
    return ", ".join(f"{column} ({_described(feature)})" for column, feature in features.items())


def _described(feature: Any) -> str:
    if isinstance(feature, datasets.Value):
        return str(feature.dtype)
    return type(feature).__name__
