"""Image classification data sets: a training and an evaluation part, with their columns and classes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, cast

import datasets
import numpy as np
from PIL import Image

from nio_hf.data.loading import (
    TEXT_TYPES,
    ColumnKind,
    DataKind,
    Rows,
    choose_split,
    describe_columns,
    describe_feature,
    divide,
    find_column,
    find_features,
    limit_rows,
    load_splits,
    read_splits,
)
from nio_hf.errors import DataError, Problem, listed, one_line
from nio_hf.recipe.settings import DataSettings
from nio_hf.vision.folders import find_image_files
from nio_hf.vision.samples import image_digest

logger = logging.getLogger(__name__)

_MAX_NAMED = 5


def digits() -> datasets.Dataset:
    """Data set of the 1,797 handwritten digits of scikit-learn, as greyscale images of 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    label = datasets.ClassLabel(names=[str(name) for name in bunch.target_names])
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": bunch.target.tolist()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(image=datasets.Image(), label=label))


def _read_images(settings: DataSettings) -> Mapping[str, Rows]:
    """Read the splits of a data set; the layout of a local folder tells its splits."""
    files = None if settings.data_files is not None else find_image_files(str(settings.dataset_name), settings.data_dir)
    if files is not None:
        settings = dataclasses.replace(settings, dataset_name="imagefolder", data_dir=None, data_files=files)
    return read_splits(settings)


def _holds_files(feature: Any) -> bool:
    """Whether a column of another type holds encoded images or their paths."""
    if isinstance(feature, dict):
        return {"bytes", "path"} <= feature.keys()
    return getattr(feature, "dtype", None) in (*TEXT_TYPES, "binary", "large_binary")


def _holds_labels(feature: Any) -> bool:
    dtype = str(getattr(feature, "dtype", None))
    return isinstance(feature, datasets.Value) and (dtype in TEXT_TYPES or dtype.startswith(("int", "uint")))


IMAGES = DataKind(
    contents="images and labels",
    folder="images in one folder per class",
    part="holds a sample of every class",
    formats=("imagefolder", "parquet", "webdataset"),
    embedded={"digits": digits},
    read=_read_images,
    digest=image_digest,
)
"""Images with their classes."""
_IMAGE = ColumnKind("image_column", "images", lambda feature: isinstance(feature, datasets.Image), _holds_files)
_LABEL = ColumnKind(
    "label_column",
    "class labels",
    lambda feature: isinstance(feature, datasets.ClassLabel),
    _holds_labels,
    # By common use; "cls" is the name that webdataset has for it.
    ("label", "labels", "cls", "class"),
)


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A data set of labelled images.

    Attributes:
        train: Samples to train on.
        evaluation: Other samples to evaluate on, unless the settings name one split for both.
        columns: Columns of the images, which are not decoded, and of the labels, integers from 0.
        class_names: Names of the classes, in the order of their labels.
        is_split: Whether the samples to evaluate on are a split of their own, and no part of the training split.
    """

    train: Rows
    evaluation: Rows
    columns: tuple[str, str]
    class_names: tuple[str, ...]
    is_split: bool


def load_image_data(settings: DataSettings, seed: int = 0) -> ImageData:
    """Load a data set of images and class labels.

    A limit of samples takes a random choice, or the first ones of a stream. Workers take equal shares of a limited
    stream, so they find fewer samples where its files are of unequal length. `seed` decides all random choices.

    Raises:
        DataError: Data set that cannot be loaded or has no such split or column; split without samples; classes that
            are evaluated but not trained on; samples without a label.
    """
    name = cast(str, settings.dataset_name)
    splits = load_splits(settings, IMAGES)
    train = choose_split(splits, settings.train_split, "train_split", name)
    image, label = find_image_columns(train, settings.image_column, settings.label_column, name)
    where = f"{settings.train_split!r} of {name}"
    _check_labels(train, label, where)
    class_names = _find_classes(train, label, settings.num_classes, name)
    train = _with_classes(train, image, label, class_names, where)

    def prepare(rows: Rows, split: str) -> Rows:
        find_image_columns(rows, image, label, name)
        _check_labels(rows, label, f"{split!r} of {name}")
        return _with_classes(rows, image, label, class_names, f"{split!r} of {name}")

    train, evaluation, is_split = divide(
        splits, train, settings, IMAGES, image, prepare=prepare, seed=seed, stratify_by=label
    )
    if isinstance(train, datasets.Dataset) and isinstance(evaluation, datasets.Dataset):
        _check_classes(train, evaluation, label, class_names, name)
    train = limit_rows(train, settings.max_train_samples, seed)
    if isinstance(train, datasets.IterableDataset):
        train = train.shuffle(seed=seed, buffer_size=settings.shuffle_buffer_size)
    # A split of its own is evaluated on the same samples in every run.
    evaluation = limit_rows(evaluation, settings.max_eval_samples, 0 if is_split else seed)
    return ImageData(train, evaluation, (image, label), class_names, is_split)


def find_image_columns(rows: Rows, image: str | None, label: str | None, name: str) -> tuple[str, str]:
    """Return the columns of images and of labels: the named ones, the only ones of their types, or those called so.

    Raises:
        DataError: No column, or more than one to choose from.
    """
    features = find_features(rows, IMAGES, name)
    fix = None
    if name == "imagefolder":
        fix = "Put the images of each class into a folder of their own"
        if len(features) > 1:
            fix = "Its metadata files replace the names of folders: add a column label to them, name one with "
            fix += f"label_column, or remove them. Their columns are {describe_columns(features)}"
    image, label = find_column(features, image, name, _IMAGE), find_column(features, label, name, _LABEL, fix)
    if image == label:
        raise DataError(Problem("label_column", f"{label!r}, the column of images", "Name another column"))
    return image, label


def _find_classes(rows: Rows, label: str, num_classes: int | None, name: str) -> tuple[str, ...]:
    """Return the names of the classes, in the order of their labels; the labels where classes have no names."""
    feature = find_features(rows, IMAGES, name)[label]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    if num_classes is not None:
        return tuple(map(str, range(num_classes)))
    is_text = feature.dtype in TEXT_TYPES
    if isinstance(rows, datasets.IterableDataset):
        found = f"{label!r} of {name} holds {describe_feature(feature)}, and a stream is not read beforehand"
        fix = "Turn streaming off" if is_text else "Set num_classes, or turn streaming off"
        raise DataError(Problem("num_classes", found, fix))
    values = rows.unique(label)
    if is_text:
        return tuple(sorted(values))
    largest = max(values)
    if largest >= len(rows):
        found = f"{label!r} of {name} holds labels up to {largest:,}, and there are {len(rows):,} images"
        raise DataError(Problem("num_classes", found, "Number the classes from 0, or set num_classes"))
    return tuple(map(str, range(largest + 1)))


def _with_classes(rows: Rows, image: str, label: str, class_names: tuple[str, ...], name: str) -> Rows:
    """Keep the columns of images, not decoded, and of labels, which have to be of these classes."""
    feature = find_features(rows, IMAGES, name)[label]
    if rows.features is None and isinstance(rows, datasets.IterableDataset):
        rows = rows._resolve_features()
    if isinstance(feature, datasets.ClassLabel):
        if tuple(feature.names) != class_names:
            found = "other classes than those of the training split, or in another order"
            raise DataError(Problem(name, found, "Give two splits of the same classes"))
    else:
        where, fix = f"{label} of {name}", "Correct it, or num_classes"
        found = f"a label that is none of the {len(class_names)} classes"
        is_text = feature.dtype in TEXT_TYPES
        largest = max(rows.unique(label)) if isinstance(rows, datasets.Dataset) and not is_text else 0
        if largest >= len(class_names):
            raise DataError(Problem(where, f"{found}: {largest}, counted from 0", fix))
        try:
            if is_text:
                # Some releases turn only one of the two types of text into classes.
                rows = rows.cast_column(label, datasets.Value("string"))
            rows = rows.cast_column(label, datasets.ClassLabel(names=list(class_names)))
        except (ValueError, KeyError) as error:
            raise DataError(Problem(where, f"{found} ({one_line(error)})", fix)) from error
    # Images stay as they are stored, so that a broken one can be named and skipped.
    return rows.cast_column(image, datasets.Image(decode=False)).select_columns([image, label])


def _check_labels(rows: Rows, label: str, name: str) -> None:
    """Refuse samples without a label, or with -1 as test splits often have. A stream shows them as it is read."""
    if isinstance(rows, datasets.IterableDataset):
        return
    labels = rows.with_format("arrow")[label][:]
    given = labels.drop_null().to_numpy()
    missing = labels.null_count + (np.count_nonzero(given < 0) if given.dtype.kind == "i" else 0)
    if missing:
        found = f"{missing} of {len(labels)} samples have no label"
        raise DataError(Problem(f"{label} of {name}", found, "Choose a split whose samples have labels"))


def _check_classes(
    train: datasets.Dataset, evaluation: datasets.Dataset, label: str, class_names: tuple[str, ...], name: str
) -> None:
    """Report classes without an image, and refuse classes that are only evaluated."""
    trained, evaluated = ({*rows.with_format("numpy")[label][:].tolist()} for rows in (train, evaluation))

    def names_of(labels: set[int]) -> str:
        names = [repr(class_names[label]) for label in sorted(labels)]
        return f"class{'es' * (len(names) > 1)} {listed(names, _MAX_NAMED)}"

    if evaluated - trained:
        found = f"images to evaluate on but none to train on of {names_of(evaluated - trained)}"
        raise DataError(Problem(f"classes of {name}", found, "Give two splits of the same classes"))
    if missing := {*range(len(class_names))} - trained:
        logger.warning("%s has no image of %s: the model cannot learn it.", name, names_of(missing))
    if trained - evaluated:
        logger.warning("No image to evaluate on of %s.", names_of(trained - evaluated))
