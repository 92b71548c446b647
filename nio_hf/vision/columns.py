"""Which column holds the images and which the labels, and what the labels mean."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np

from nio_hf.data.columns import (
    TEXT_TYPES,
    ColumnKind,
    describe_columns,
    describe_feature,
    find_column,
    find_features,
)
from nio_hf.data.sources import Rows
from nio_hf.errors import DataError, Problem, one_line
from nio_hf.vision.sources import IMAGES

_LABEL_NAMES = ("label", "labels", "cls", "class")
"""Columns that hold labels by common use, where none has the type; "cls" is that of webdataset."""


def find_image_column(rows: Rows, column: str | None, name: str) -> str:
    """The column of images: the one that is named, or the only one of that type.

    Raises:
        DataError: where there is none, or more than one to choose from.
    """
    return find_column(find_features(rows, IMAGES, name), column, name, _IMAGE)


def find_label_column(rows: Rows, column: str | None, name: str) -> str:
    """The column of labels: the one that is named, the only one of that type, or one that is called so.

    Raises:
        DataError: where there is none, or more than one to choose from.
    """
    features = find_features(rows, IMAGES, name)
    fix = _fix_of_folder(features) if name == "imagefolder" else None
    return find_column(features, column, name, _LABEL, fix)


def _fix_of_folder(features: datasets.Features) -> str:
    """What to do about a folder of images without labels."""
    if len(features) == 1:
        return "Put the images of each class into a folder of their own"
    return (
        "Its metadata files replace the names of folders: add a column label to them, name one with "
        f"label_column, or remove them. Their columns are {describe_columns(features)}"
    )


def classes_of(rows: Rows, label_column: str, num_classes: int | None, name: str) -> tuple[str, ...]:
    """Names of the classes, in the order of their labels: as the data set has them, or as its labels are.

    Raises:
        DataError: where they cannot be known.
    """
    feature = find_features(rows, IMAGES, name)[label_column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    if num_classes is not None:
        return tuple(map(str, range(num_classes)))
    if isinstance(rows, datasets.IterableDataset):
        found = f"{label_column!r} of {name} holds {describe_feature(feature)}, and a stream is not read beforehand"
        fix = "Turn streaming off" if feature.dtype in TEXT_TYPES else "Set num_classes, or turn streaming off"
        raise DataError(Problem("num_classes", found, fix))
    values = _values(rows, label_column)
    return tuple(sorted(values)) if feature.dtype in TEXT_TYPES else tuple(map(str, range(max(values) + 1)))


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
    feature = find_features(rows, IMAGES, name)[label_column]
    wanted = datasets.ClassLabel(names=list(class_names))
    if isinstance(feature, datasets.ClassLabel):
        if tuple(feature.names) != class_names:
            found = "other classes than those of the training split, or in another order"
            raise DataError(Problem(name, found, "Give two splits of the same classes"))
        return rows
    where, fix = f"{label_column} of {name}", "Correct it, or num_classes"
    if isinstance(rows, datasets.Dataset) and feature.dtype not in TEXT_TYPES:
        largest = max(_values(rows, label_column))
        if largest >= len(class_names):
            found = f"a label that is none of the {len(class_names)} classes: {largest}, counted from 0"
            raise DataError(Problem(where, found, fix))
    try:
        if feature.dtype in TEXT_TYPES:
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


def _holds_files(feature: Any) -> bool:
    """Whether a column of another type holds encoded images or their paths."""
    if isinstance(feature, dict):
        return {"bytes", "path"} <= feature.keys()
    return getattr(feature, "dtype", None) in (*TEXT_TYPES, "binary", "large_binary")


def _holds_labels(feature: Any) -> bool:
    dtype = str(getattr(feature, "dtype", None))
    return isinstance(feature, datasets.Value) and (dtype in TEXT_TYPES or dtype.startswith(("int", "uint")))


_IMAGE = ColumnKind("image_column", "images", lambda feature: isinstance(feature, datasets.Image), _holds_files)
_LABEL = ColumnKind(
    "label_column",
    "class labels",
    lambda feature: isinstance(feature, datasets.ClassLabel),
    _holds_labels,
    _LABEL_NAMES,
)
