"""Images, and the files of data sets, made by the tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

BROKEN = b"no image at all"


def photo(seed: int, height: int = 6, width: int = 5) -> Image.Image:
    """An RGB image of noise, another one for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def stored(content: bytes | None, path: str | None = None) -> dict[str, Any]:
    """An image as `datasets.Image` stores it."""
    return {"bytes": content, "path": path}


def as_bytes(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def pixels_of(image: Image.Image) -> bytes:
    return np.asarray(image).tobytes()


def as_they_are(images: list[Image.Image]) -> list[torch.Tensor]:
    """A transform that changes nothing."""
    return [as_bytes(image) for image in images]


def write_folder(root: Path, classes: Iterable[str] = ("cat", "dog"), images: int = 8, first_seed: int = 0) -> Path:
    """PNG images in a folder per class, all different."""
    seed = first_seed
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(images):
            photo(seed).save(root / name / f"{index}.png")
            seed += 1
    return root


def write_parquet(
    file: Path,
    labels: Sequence[Any],
    feature: Any = None,
    *,
    images: Sequence[Any] | None = None,
    label_column: str = "label",
    first_seed: int = 0,
) -> str:
    """A parquet file as `datasets` writes it: images, and labels of a feature (int64 where none is given)."""
    if images is None:
        images = [stored(encoded(photo(first_seed + index)), f"{index}.png") for index in range(len(labels))]
    features = datasets.Features(
        {"image": datasets.Image(), label_column: datasets.Value("int64") if feature is None else feature}
    )
    columns = {"image": list(images), label_column: list(labels)}
    made = datasets.Dataset.from_dict(columns, features=features)
    if len(made):
        made.to_parquet(str(file))
    else:
        # Which some releases cannot.
        pq.write_table(made.data.table, file)
    return str(file)


def write_foreign_parquet(file: Path, labels: Sequence[Any], images: Sequence[dict[str, Any]]) -> str:
    """A parquet file of somebody who does not know `datasets`: no feature types, images as bytes and path."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(list(images), kind), "label": list(labels)}), file)
    return str(file)


def write_tar(file: Path, samples: Iterable[dict[str, bytes]]) -> str:
    """A webdataset shard: {"jpg": ..., "cls": ...} of each sample."""
    with tarfile.open(file, "w") as archive:
        for number, sample in enumerate(samples):
            for extension, content in sample.items():
                member = tarfile.TarInfo(f"{number:03d}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return str(file)
