"""Image classification data sets: a training and an evaluation part, with their columns and classes."""

from __future__ import annotations

import dataclasses

import datasets
import numpy as np
from PIL import Image

from nio_hf.errors import DataError, Problem, one_line

DIGITS = "digits"


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A data set of labelled images.

    Attributes:
        train: samples to train on.
        evaluation: samples to evaluate on; none of them is in `train`.
        image_column: name of the column of images.
        label_column: name of the column of class labels.
        class_names: names of the classes, in the order of their labels.
    """

    train: datasets.Dataset
    evaluation: datasets.Dataset
    image_column: str
    label_column: str
    class_names: tuple[str, ...]


def load_image_data(
    name: str,
    *,
    config_name: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    eval_fraction: float = 0.2,
    image_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
) -> ImageData:
    """Load a data set of images and class labels.

    Args:
        name: "digits", or what [`datasets.load_dataset`] takes: a Hub name, a local folder.
        config_name: configuration of the data set.
        train_split: split to train on.
        eval_split: split to evaluate on; None sets a part of the training split aside, the same of every class.
        eval_fraction: size of that part, in (0, 1).
        image_column: None for the only column of images.
        label_column: None for the only column of class labels.
        seed: of the choice of that part.

    Raises:
        DataError: for a data set that cannot be loaded, a split or column that it does not have, or an empty one.
    """
    splits = datasets.DatasetDict(train=digits()) if name == DIGITS else _load(name, config_name)
    train = _split(splits, train_split, "train_split", name)
    image_column = image_column or _only_column(train, datasets.Image, "image_column", name)
    label_column = label_column or _only_column(train, datasets.ClassLabel, "label_column", name)
    labels = _labels(train, image_column, label_column, name)
    if eval_split is not None:
        evaluation = _split(splits, eval_split, "eval_split", name)
        if _labels(evaluation, image_column, label_column, name).names != labels.names:
            found = f"the classes of {eval_split!r} are not those of {train_split!r}"
            raise DataError(Problem(f"dataset {name}", found, "Give two splits of the same classes"))
    else:
        train, evaluation = _set_aside(train, eval_fraction, label_column, seed, name)
    return ImageData(train, evaluation, image_column, label_column, tuple(labels.names))


def digits() -> datasets.Dataset:
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn, as greyscale images."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(name) for name in bunch.target_names])
    )
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": bunch.target.tolist()}
    return datasets.Dataset.from_dict(columns, features=features)


def _load(name: str, config_name: str | None) -> datasets.DatasetDict:
    try:
        loaded = datasets.load_dataset(name, config_name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        fix = f"Give {DIGITS!r}, the name of a data set on the Hub, or a local folder"
        raise DataError(Problem("dataset_name", f"{name!r} cannot be loaded: {one_line(error)}", fix)) from error
    return loaded


def _split(splits: datasets.DatasetDict, split: str, key: str, name: str) -> datasets.Dataset:
    if split not in splits:
        raise DataError(Problem(key, f"{split!r} is no split of {name}", f"Choose one of {', '.join(splits)}"))
    if len(splits[split]) == 0:
        raise DataError(Problem(key, f"the split {split!r} of {name} is empty", "Give a split with samples"))
    return splits[split]


def _only_column(dataset: datasets.Dataset, feature_type: type, key: str, name: str) -> str:
    columns: list[str] = [column for column, feature in dataset.features.items() if isinstance(feature, feature_type)]
    if len(columns) == 1:
        return columns[0]
    found = f"{len(columns)} columns of type {feature_type.__name__} in {name}"
    raise DataError(Problem(key, found, f"Name one of its columns: {', '.join(dataset.column_names)}"))


def _labels(dataset: datasets.Dataset, image_column: str, label_column: str, name: str) -> datasets.ClassLabel:
    """The feature of the label column, where both columns are what they should be."""
    wanted = {image_column: datasets.Image, label_column: datasets.ClassLabel}
    for column, feature_type in wanted.items():
        feature = dataset.features.get(column)
        if not isinstance(feature, feature_type):
            found = "no such column" if feature is None else f"a column of type {type(feature).__name__}"
            fix = f"Name a column of type {feature_type.__name__}; there are {', '.join(dataset.column_names)}"
            raise DataError(Problem(f"column {column!r} of {name}", found, fix))
    return dataset.features[label_column]


def _set_aside(
    dataset: datasets.Dataset, fraction: float, label_column: str, seed: int, name: str
) -> tuple[datasets.Dataset, datasets.Dataset]:
    try:
        parts = dataset.train_test_split(fraction, seed=seed, stratify_by_column=label_column)
    except ValueError as error:
        found = f"{fraction} of {len(dataset)} samples of {name} cannot be set aside ({error})"
        fix = "Give a part in (0, 1) that holds a sample of every class, or an eval_split"
        raise DataError(Problem("eval_fraction", found, fix)) from error
    return parts["train"], parts["test"]
