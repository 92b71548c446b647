"""Image classification data sets: a training and an evaluation part, with their columns and classes."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import datasets
import numpy as np

from nio_hf.data.parts import choose_split, limit, name_eval_split, set_aside
from nio_hf.data.sources import Rows, Source, load_splits
from nio_hf.errors import DataError, Problem, listed
from nio_hf.vision.columns import (
    check_labels,
    classes_of,
    find_image_column,
    find_label_column,
    with_classes,
    without_decoding,
)
from nio_hf.vision.images import image_digest
from nio_hf.vision.sources import IMAGES

logger = logging.getLogger(__name__)

_MAX_NAMED = 5


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A data set of labelled images.

    Attributes:
        train: samples to train on, images not decoded.
        evaluation: samples to evaluate on; none of them is in `train`, unless both splits are the same by request.
        image_column: name of the column of images.
        label_column: name of the column of class labels, integers from 0.
        class_names: names of the classes, in the order of their labels.
        is_split: whether the samples to evaluate on are a split of their own, and no part of the training split.
    """

    train: Rows
    evaluation: Rows
    image_column: str
    label_column: str
    class_names: tuple[str, ...]
    is_split: bool


def load_image_data(
    name: str,
    *,
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
    image_column: str | None = None,
    label_column: str | None = None,
    num_classes: int | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
) -> ImageData:
    """Load a data set of images and class labels.

    Args:
        name: "digits", or what [`datasets.load_dataset`] takes.
        config_name: configuration of the data set.
        revision: of a data set on the Hub.
        data_dir: folder in the data set, or of the files.
        data_files: files as a pattern, a list of them, or a mapping from splits.
        streaming: read while training, without downloading everything.
        shuffle_buffer_size: samples that the training stream is shuffled over.
        train_split: split to train on.
        eval_split: split to evaluate on; None for the validation split, and where there is none a part of the training
            split: the same of every class, or for a stream a share by digest, which no order or worker changes.
        eval_fraction: size of that part, in (0, 1).
        eval_from_train: evaluate on that part whatever splits there are.
        image_column: None for the only column of images.
        label_column: None for the only column of class labels.
        num_classes: for a stream of integer labels whose classes have no names.
        max_train_samples: use at most so many samples to train on, a random choice unless they are a stream. Of a
            stream workers take equal shares of it, so they find fewer where they do not share its files evenly.
        max_eval_samples: likewise to evaluate on.
        seed: of all random choices.

    Raises:
        DataError: for a data set that cannot be loaded, a split or column that it does not have, one without samples,
            classes that are to be evaluated but not trained on, or samples without a label.
    """
    splits = load_splits(Source(name, config_name, revision, data_dir, data_files, streaming), IMAGES)
    train = choose_split(splits, train_split, "train_split", name)
    image_column = find_image_column(train, image_column, name)
    label_column = find_label_column(train, label_column, name)
    if image_column == label_column:
        raise DataError(Problem("label_column", f"{label_column!r}, the column of images", "Name another column"))
    check_labels(train, label_column, f"{train_split!r} of {name}")
    class_names = classes_of(train, label_column, num_classes, name)
    train = _labelled(train, image_column, label_column, class_names, f"{train_split!r} of {name}")
    eval_split = name_eval_split(splits, train_split, eval_split, eval_from_train)
    if eval_split is None:
        train, evaluation = set_aside(
            train,
            eval_fraction,
            digest=_ImageDigest(image_column, seed),
            seed=seed,
            name=name,
            need="holds a sample of every class",
            stratify_by=label_column,
        )
    else:
        rows = choose_split(splits, eval_split, "eval_split", name)
        find_image_column(rows, image_column, name)
        find_label_column(rows, label_column, name)
        check_labels(rows, label_column, f"{eval_split!r} of {name}")
        evaluation = _labelled(rows, image_column, label_column, class_names, f"{eval_split!r} of {name}")
    if isinstance(train, datasets.Dataset) and isinstance(evaluation, datasets.Dataset):
        _check_classes(train, evaluation, label_column, class_names, name)
    train = limit(train, max_train_samples, seed)
    evaluation = limit(evaluation, max_eval_samples, seed)
    if isinstance(train, datasets.IterableDataset):
        train = train.shuffle(seed=seed, buffer_size=shuffle_buffer_size)
    return ImageData(train, evaluation, image_column, label_column, class_names, eval_split is not None)


def _labelled(rows: Rows, image_column: str, label_column: str, class_names: tuple[str, ...], name: str) -> Rows:
    """The samples of a split with images that are not decoded and labels of these classes."""
    return with_classes(without_decoding(rows, image_column), label_column, class_names, name)


@dataclasses.dataclass(frozen=True)
class _ImageDigest:
    """The digest of the image of a sample."""

    image_column: str
    seed: int

    def __call__(self, row: dict[str, Any]) -> int:
        return image_digest(row[self.image_column], self.seed)


def _check_classes(
    train: datasets.Dataset,
    evaluation: datasets.Dataset,
    label_column: str,
    class_names: tuple[str, ...],
    name: str,
) -> None:
    """Report classes without an image, and refuse those that are only evaluated."""
    counts = []
    for rows in (train, evaluation):
        labels = np.asarray(rows.with_format("numpy")[label_column][:])
        counts.append(np.bincount(labels, minlength=len(class_names)))
    trained, evaluated = (count > 0 for count in counts)
    if (evaluated & ~trained).any():
        found = f"images to evaluate on but none to train on of {_named(class_names, evaluated & ~trained)}"
        raise DataError(Problem(f"classes of {name}", found, "Give two splits of the same classes"))
    if not trained.all():
        logger.warning("%s has no image of %s: the model cannot learn it.", name, _named(class_names, ~trained))
    if (trained & ~evaluated).any():
        logger.warning("No image to evaluate on of %s.", _named(class_names, trained & ~evaluated))


def _named(class_names: tuple[str, ...], which: Any) -> str:
    names = [repr(name) for name, chosen in zip(class_names, which, strict=True) if chosen]
    return f"class{'es' * (len(names) > 1)} {listed(names, _MAX_NAMED)}"
