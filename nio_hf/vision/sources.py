"""Where images come from: the Hub, local files, or scikit-learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import datasets
import numpy as np
from PIL import Image

from nio_hf.data.sources import DataKind, Rows, Source, read_source
from nio_hf.vision.folders import find_image_folder


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


def _read_images(source: Source) -> Mapping[str, Rows]:
    """The splits of a data set, those of a local folder as its layout says.

    Raises:
        DataError: for a folder of images whose classes cannot be known.
    """
    local = find_image_folder(source.name, source.data_dir) if source.data_files is None else None
    if local is None:
        return read_source(source)
    key, folder = local
    folder.check(key)
    files = folder.data_files()
    return read_source(dataclasses.replace(source, name="imagefolder", data_dir=None, data_files=files))


IMAGES = DataKind(
    contents="images",
    columns="images and labels",
    files="exist",
    folder="images in one folder per class",
    formats=("imagefolder", "parquet", "webdataset"),
    embedded={"digits": digits},
    read=_read_images,
)
"""Images with their classes."""
