"""Samples for a data loader: stored images, read and transformed one by one or as a stream."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, default_collate

from nio_hf.errors import BrokenImageError, DataError, Problem, one_line
from nio_hf.vision.images import image_digest, read_image
from nio_hf.vision.sample_random import draw_seed

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100
"""Label of a sample that counts neither in the loss nor in the metrics."""
SEEDS = "seeds"
"""Key of the seeds of samples, by which they are augmented on the device."""
Transform = Callable[[list[Image.Image]], list[torch.Tensor]]
"""n RGB images to pixel values (channels, height, width) of each."""

_MAX_BROKEN_IN_A_ROW = 100
_STREAM_SLOTS = 2**16


class BrokenImages:
    """Counts the images that were passed over, each once, in all processes that load for this one.

    Args:
        slots: of images that are told apart.
    """

    def __init__(self, slots: int) -> None:
        self._seen = torch.zeros(slots, dtype=torch.bool).share_memory_()

    def note(self, slot: int, error: BrokenImageError) -> None:
        """Note one, and say which the first time."""
        if not self._seen[slot]:
            self._seen[slot] = True
            logger.warning("Skipped: %s", error.problems[0])

    @property
    def total(self) -> int:
        """How many there were so far."""
        return int(self._seen.sum())


def collate_images(samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of samples: `pixel_values` (B, channels, height, width), `labels` (B,), and `seeds` (B,) where given.

    Pixels of Pillow have their channels last in memory, and are copied faster as they lie.
    """
    channels_last = samples[0]["pixel_values"].stride(0) == 1
    order, back = ((1, 2, 0), (0, 3, 1, 2)) if channels_last else ((0, 1, 2), (0, 1, 2, 3))
    pixel_values = default_collate([sample["pixel_values"].permute(order) for sample in samples]).permute(back)
    numbers = [key for key in ("labels", SEEDS) if key in samples[0]]
    return {"pixel_values": pixel_values, **{key: torch.tensor([sample[key] for sample in samples]) for key in numbers}}


class ImageSamples(Dataset[dict[str, Any]]):
    """Samples `{"pixel_values": (channels, height, width), "labels": int}` of a map-style data set.

    With `seeded` a sample also has a seed for what augments it later: `{..., "seeds": int}`.

    Args:
        rows: with images that are not decoded.
        image_column: name of the column of images.
        label_column: name of the column of labels.
        transform: from RGB images to pixel values.
        part: name of the part in messages, "train" or "evaluation".
        skip_broken: pass over images that cannot be read: while training, the next one that can be read takes its
            place; in evaluation, a black image that does not count.
        replace: whether to replace them by the next.
        seeded: whether samples have a seed, which torch's CPU generator draws behind the transform.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image_column: str,
        label_column: str,
        transform: Transform,
        *,
        part: str,
        skip_broken: bool = False,
        replace: bool = True,
        seeded: bool = False,
    ) -> None:
        self._rows = rows
        self._image_column = image_column
        self._label_column = label_column
        self._transform = transform
        self._part = part
        self._skip_broken = skip_broken
        self._replace = replace
        self._seeded = seeded
        self.broken = BrokenImages(len(rows))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        image, label = self._read(index, row[self._image_column], row[self._label_column])
        return _sample(self._transform([image])[0], label, self._seeded)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The samples at some positions; all are transformed together."""
        rows = self._rows[list(indices)]
        stored = zip(indices, rows[self._image_column], rows[self._label_column], strict=True)
        images, labels = zip(*(self._read(index, image, label) for index, image, label in stored), strict=True)
        transformed = zip(self._transform(list(images)), labels, strict=True)
        return [_sample(pixels, label, self._seeded) for pixels, label in transformed]

    def _read(self, index: int, stored: Any, label: int) -> tuple[Image.Image, int]:
        for position in range(index, index + _MAX_BROKEN_IN_A_ROW):
            if position > index:
                row = self._rows[position % len(self)]
                stored, label = row[self._image_column], row[self._label_column]
            try:
                return read_image(stored, f"image {position % len(self)} of the {self._part} part"), label
            except BrokenImageError as error:
                if not self._skip_broken:
                    raise
                self.broken.note(position % len(self), error)
                if not self._replace:
                    return Image.new("RGB", (1, 1)), IGNORED_LABEL
        raise _too_many(self._part)


class ImageStream(IterableDataset[dict[str, Any]]):
    """Samples as those of [`ImageSamples`] from a stream.

    Args:
        rows: a stream with images that are not decoded.
        image_column: name of the column of images.
        label_column: name of the column of labels.
        transform: from RGB images to pixel values.
        classes: number of classes; a label of another one is an error.
        part: name of the part in messages.
        skip_broken: leave images out that cannot be read.
        seeded: as in [`ImageSamples`].
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        image_column: str,
        label_column: str,
        transform: Transform,
        *,
        classes: int,
        part: str,
        skip_broken: bool = False,
        seeded: bool = False,
    ) -> None:
        self._rows = rows
        self._image_column = image_column
        self._label_column = label_column
        self._transform = transform
        self._classes = classes
        self._part = part
        self._skip_broken = skip_broken
        self._seeded = seeded
        self.broken = BrokenImages(_STREAM_SLOTS)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew, in an order that depends on the seed and the epoch."""
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        broken_in_a_row = 0
        for position, row in enumerate(self._readable_rows()):
            name = f"image {position} of the {self._part} stream"
            try:
                image = read_image(row[self._image_column], name)
            except BrokenImageError as error:
                if not self._skip_broken:
                    raise
                self.broken.note(_stream_slot(row[self._image_column]), error)
                broken_in_a_row += 1
                if broken_in_a_row == _MAX_BROKEN_IN_A_ROW:
                    raise _too_many(self._part) from error
                continue
            broken_in_a_row = 0
            label = row[self._label_column]
            if not isinstance(label, int) or not 0 <= label < self._classes:
                found = f"label {label!r}, there are {self._classes} classes counted from 0"
                raise DataError(Problem(name, found, "Correct the labels, or set num_classes"))
            yield _sample(self._transform([image])[0], label, self._seeded)

    def _readable_rows(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self._rows
        except Exception as error:  # whatever readers of files and networks raise
            found = f"cannot be read on: {one_line(error)}"
            fix = "Check the files that it is read from, and the labels in them"
            raise DataError(Problem(f"the {self._part} stream", found, fix)) from error


def _sample(pixels: torch.Tensor, label: int, seeded: bool) -> dict[str, Any]:
    sample = {"pixel_values": pixels, "labels": label}
    return {**sample, SEEDS: draw_seed()} if seeded else sample


def _stream_slot(stored: Any) -> int:
    """What tells an image of a stream from others, in every pass over it."""
    path = (stored or {}).get("path") or ""
    return zlib.crc32(path.encode(), image_digest(stored)) % _STREAM_SLOTS


def _too_many(part: str) -> DataError:
    found = f"{_MAX_BROKEN_IN_A_ROW} images in a row cannot be read"
    return DataError(Problem(f"the {part} part", found, "Check where the images are stored"))
