"""Samples for a data loader: stored images, read as RGB and transformed, from rows or a stream."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import Any, cast

import datasets
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset, IterableDataset, default_collate

from nio_hf.errors import BrokenImageError, DataError, Problem, one_line

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100
"""Label of samples that count neither in the loss nor in the metrics."""
SEEDS = "seeds"
"""Key of the seeds of samples, by which they are augmented on the device."""
MAX_SEED = 2**62
Transform = Callable[[list[Image.Image]], list[torch.Tensor]]
"""Function from RGB images to the pixel values (channels, height, width) of each."""
Sample = dict[str, Any]
COLUMNS = ("image", "label")
"""Usual columns of images and labels."""

_MAX_BROKEN_IN_A_ROW = 100
_STREAM_SLOTS = 2**16
_SIXTEEN_BITS = 257
"""Divisor 65535 / 255 of greyscale of 16 bits, which Pillow would clip."""
_FIX = "Replace or remove it, or set skip_broken_images: true"
_FEATURE = datasets.Image()


def read_image(stored: Any, name: str) -> Image.Image:
    """Read an image in RGB, upright.

    Greyscale, palette and CMYK are converted, transparency is dropped as in the inference of transformers, and an EXIF
    orientation is applied.

    Args:
        stored: Image, or `{"bytes": ..., "path": ...}` as [`datasets.Image`] stores it, with a path that is local, in
            an archive or remote.
        name: Name of the image in messages.

    Raises:
        BrokenImageError: File that is missing, truncated, no image, or larger than Pillow allows.
    """
    where = name
    try:
        if isinstance(stored, Image.Image):
            return _to_rgb(ImageOps.exif_transpose(stored))
        stored = stored or {"bytes": None, "path": None}
        if stored["path"]:
            where = f"{stored['path']} ({name})"
        elif stored["bytes"] is None:
            raise BrokenImageError(Problem(where, "no image", _FIX))
        with _FEATURE.decode_example(stored) as image:  # a file of several pictures stays open
            return _to_rgb(image)
    except BrokenImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BrokenImageError(Problem(where, f"too large: {one_line(error)}", _FIX)) from error
    except Exception as error:  # whatever Pillow's decoders raise for a damaged file
        reason = "its format is not known" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise BrokenImageError(Problem(where, f"cannot be read as an image: {reason}", _FIX)) from error


def image_digest(stored: Any, seed: int = 0) -> int:
    """Digest in [0, 2^32) of a stored image: the same in whatever order and folder the images come.

    The last two parts of its path stand for a file without bytes, in its archive if need be. Another seed gives
    another digest.
    """
    stored = stored or {"bytes": None, "path": None}
    path, _, _ = (stored["path"] or "").partition("::")
    content = stored["bytes"] or "/".join(PurePath(path).parts[-2:]).encode()
    return zlib.crc32(content, seed)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ValueError("pixels that are fractions have no known range")
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / _divisor(image))).convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _divisor(image: Image.Image) -> int:
    """By what greyscale of 16 or 32 bits is divided to be one of 8 bits.

    Raises:
        ValueError: Numbers of 32 bits that are no greyscale of 8 or 16 bits.
    """
    if image.mode != "I":
        return _SIXTEEN_BITS
    least, largest = cast(tuple[float, float], image.getextrema())
    if least < 0 or largest >= 2**16:
        raise ValueError(f"pixels from {least:.0f} to {largest:.0f} have no known range")
    return 1 if largest < 2**8 else _SIXTEEN_BITS


def draw_seed() -> int:
    """Draw the seed of a sample from torch's CPU generator."""
    return int(torch.randint(MAX_SEED, ()))


def collate_images(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Make a batch: `pixel_values` (B, channels, height, width), `labels` (B,), and `seeds` (B,) of seeded samples.

    Pixels of Pillow have their channels last in memory, and are copied faster in that order.
    """
    channels_last = samples[0]["pixel_values"].stride(0) == 1
    order, back = ((1, 2, 0), (0, 3, 1, 2)) if channels_last else ((0, 1, 2), (0, 1, 2, 3))
    pixel_values = default_collate([sample["pixel_values"].permute(order) for sample in samples]).permute(back)
    numbers = [key for key in ("labels", SEEDS) if key in samples[0]]
    return {"pixel_values": pixel_values, **{key: torch.tensor([sample[key] for sample in samples]) for key in numbers}}


class _Images:
    """Reader of images, which counts the broken ones over all workers.

    Args:
        rows: Rows with images that are not decoded.
        transform: Function from RGB images to pixel values.
        columns: Columns of images and labels.
        part: Name of the part in messages, "train" or "evaluation".
        skip_broken: Whether to skip images that cannot be read.
        seeded: Whether samples have a seed, `{..., "seeds": int}`, by which they are augmented later. torch's CPU
            generator draws it after the transform.
    """

    def __init__(
        self,
        rows: Any,
        transform: Transform,
        columns: tuple[str, str] = COLUMNS,
        *,
        part: str,
        skip_broken: bool = False,
        seeded: bool = False,
    ) -> None:
        self._rows = rows
        self._transform = transform
        self._columns = columns
        self._part = part
        self._skip_broken = skip_broken
        self._seeded = seeded
        slots = len(rows) if hasattr(rows, "__len__") else _STREAM_SLOTS
        self._broken = torch.zeros(slots, dtype=torch.bool).share_memory_()

    @property
    def skipped(self) -> int:
        """Number of skipped images, each counted once."""
        return int(self._broken.sum())

    def _try_to_read(self, stored: Any, name: str, slot: int) -> Image.Image | None:
        """Read an image; None for a broken one that is skipped, which is reported the first time."""
        try:
            return read_image(stored, name)
        except BrokenImageError as error:
            if not self._skip_broken:
                raise
            if not self._broken[slot]:
                self._broken[slot] = True
                logger.warning("Skipped: %s", error.problems[0])
            return None

    def _samples(self, images: Sequence[Image.Image], labels: Sequence[int]) -> list[Sample]:
        made = [
            {"pixel_values": pixels, "labels": label}
            for pixels, label in zip(self._transform(list(images)), labels, strict=True)
        ]
        return [{**sample, SEEDS: draw_seed()} for sample in made] if self._seeded else made

    def _too_many(self) -> DataError:
        found = f"{_MAX_BROKEN_IN_A_ROW} images in a row cannot be read"
        return DataError(Problem(f"the {self._part} part", found, "Check where the images are stored"))


class ImageSamples(_Images, Dataset[Sample]):
    """Samples `{"pixel_values": (channels, height, width), "labels": int}` of a map-style data set.

    A broken image is replaced by the next readable one in training, and by a black one that does not count in
    evaluation. Arguments are as in [`_Images`].
    """

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Samples at some positions, transformed together."""
        rows = self._rows[list(indices)]
        stored = zip(indices, *(rows[column] for column in self._columns), strict=True)
        images, labels = zip(*(self._read(index, image, label) for index, image, label in stored), strict=True)
        return self._samples(images, labels)

    def _read(self, index: int, stored: Any, label: int) -> tuple[Image.Image, int]:
        for position in range(index, index + _MAX_BROKEN_IN_A_ROW):
            place = position % len(self)
            if position > index:
                stored, label = map(self._rows[place].get, self._columns)
            image = self._try_to_read(stored, f"image {place} of the {self._part} part", place)
            if image is not None:
                return image, label
            if self._part != "train":
                return Image.new("RGB", (1, 1)), IGNORED_LABEL
        raise self._too_many()


class ImageStream(_Images, IterableDataset[Sample]):
    """Samples as in [`ImageSamples`] from a stream. Skipped images are left out.

    Args:
        *arguments: Arguments of [`_Images`].
        classes: Number of classes; a label of another class is an error.
        **options: Options of [`_Images`].
    """

    def __init__(self, *arguments: Any, classes: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._classes = classes

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew, in an order that depends on the seed and the epoch."""
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Sample]:
        broken_in_a_row = 0
        for position, row in enumerate(self._readable_rows()):
            name = f"image {position} of the {self._part} stream"
            stored, label = map(row.get, self._columns)
            # The slot of an image is the same in every pass over the stream.
            path = (stored or {}).get("path") or ""
            image = self._try_to_read(stored, name, zlib.crc32(path.encode(), image_digest(stored)) % _STREAM_SLOTS)
            broken_in_a_row = broken_in_a_row + 1 if image is None else 0
            if broken_in_a_row == _MAX_BROKEN_IN_A_ROW:
                raise self._too_many()
            if image is None:
                continue
            if not isinstance(label, int) or not 0 <= label < self._classes:
                found = f"label {label!r}, there are {self._classes} classes counted from 0"
                raise DataError(Problem(name, found, "Correct the labels, or set num_classes"))
            yield self._samples([image], [label])[0]

    def _readable_rows(self) -> Iterator[Sample]:
        try:
            yield from self._rows
        except Exception as error:  # whatever readers of files and networks raise
            found = f"cannot be read further: {one_line(error)}"
            fix = "Check the files that it is read from, and the labels in them"
            raise DataError(Problem(f"the {self._part} stream", found, fix)) from error
