"""Where images come from: the Hub, local files, or scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import datasets
import numpy as np
from PIL import Image

from nio_hf.errors import DataError, Problem, one_line
from nio_hf.vision.folders import find_image_folder

DIGITS = "digits"
_FORMATS = ("imagefolder", "parquet", "webdataset")

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset
"""Samples of a split: all of them at hand, or a stream."""


def load_splits(
    name: str,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    data_dir: str | None = None,
    data_files: Any = None,
    streaming: bool = False,
) -> Mapping[str, Rows]:
    """The splits of a data set, by name.

    Args:
        name: "digits", or what [`datasets.load_dataset`] takes.
        config_name: configuration of the data set.
        revision: on the Hub.
        data_dir: folder in the data set, or of the files.
        data_files: a pattern, a list of them, or a mapping from splits.
        streaming: do not download or convert anything beforehand.

    Raises:
        DataError: for a data set that cannot be loaded, and a folder of images whose classes cannot be known.
    """
    if name == DIGITS:
        rows = digits()
        return {"train": rows.to_iterable_dataset() if streaming else rows}
    if name in _FORMATS and data_dir is None and data_files is None:
        found = f"{name!r} without data_dir or data_files"
        raise DataError(Problem("dataset_name", found, "Give one of them with it"))
    loader, directory, files = name, data_dir, data_files
    local = find_image_folder(name, data_dir) if data_files is None else None
    if local is not None:
        key, folder = local
        folder.check(key)
        loader, directory, files = "imagefolder", None, folder.data_files()
    try:
        splits: Mapping[str, Rows] = datasets.load_dataset(
            loader,
            config_name,
            revision=revision,
            data_dir=directory,
            data_files=files,
            streaming=streaming,
        )
    except Exception as error:  # `datasets` hands on what readers of files and networks raise
        raise DataError(_load_problem(name, data_dir, data_files, error)) from error
    if not splits:
        raise DataError(Problem("dataset_name", f"{name!r} has no split", "Give a data set with images"))
    return splits


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


def _load_problem(name: str, data_dir: str | None, data_files: Any, error: Exception) -> Problem:
    """The problem of a data set that cannot be loaded, with the setting to look at."""
    cause = one_line(error.__cause__ or error)
    if name not in _FORMATS:
        fix = f"Give {DIGITS!r}, the name of a data set on the Hub, a local folder, or {', '.join(_FORMATS)}"
        return Problem("dataset_name", f"{name!r} cannot be loaded: {cause}", fix)
    if data_files is not None:
        fix = "Give files that exist, relative to where you are"
        return Problem("data_files", f"{data_files!r} cannot be loaded as {name!r}: {cause}", fix)
    fix = "Give a folder with images in one folder per class"
    return Problem("data_dir", f"{data_dir!r} cannot be loaded as {name!r}: {cause}", fix)
