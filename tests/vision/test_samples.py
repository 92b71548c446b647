"""Samples for a data loader: what becomes of images that cannot be read, in this process and in workers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoConfig

from nio_hf.errors import BrokenImageError, DataError
from nio_hf.vision.processors import make_image_processor
from nio_hf.vision.samples import IGNORED_LABEL, ImageSamples, ImageStream, collate_images
from nio_hf.vision.transforms import EvaluationTransform
from tests.vision.pictures import BROKEN, as_bytes, as_they_are, encoded, photo, stored, write_parquet

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

TEN = datasets.ClassLabel(num_classes=10)


def rows(images: int, broken: set[int]) -> datasets.Dataset:
    """Images that are not decoded; that of index i is `photo(i)` of class i mod 10, or broken."""
    stored_images = [
        stored(BROKEN if index in broken else encoded(photo(index)), f"photos/{index}.png") for index in range(images)
    ]
    features = datasets.Features(image=datasets.Image(decode=False), label=TEN)
    labels = [index % 10 for index in range(images)]
    return datasets.Dataset.from_dict({"image": stored_images, "label": labels}, features=features)


def samples(images: int, broken: set[int], **settings: Any) -> ImageSamples:
    part = settings.pop("part", "train")
    return ImageSamples(rows(images, broken), "image", "label", as_they_are, part=part, **settings)


def streamed(root: Path, images: int, broken: set[int], shards: int = 1, **settings: Any) -> ImageStream:
    """The same images as a stream of shards, each with a part of the images in a row."""
    each = images // shards
    files = []
    for shard in range(shards):
        part = rows(images, broken).select(range(shard * each, (shard + 1) * each))
        files.append(write_parquet(root / f"{shard}.parquet", part["label"], TEN, images=part["image"]))
    stream = datasets.load_dataset("parquet", data_files=files, streaming=True)["train"]
    undecoded = stream.cast_column("image", datasets.Image(decode=False))
    return ImageStream(undecoded, "image", "label", as_they_are, classes=10, part="train", **settings)


def loaded(data: ImageSamples | ImageStream, workers: int) -> list[dict[str, Any]]:
    return list(DataLoader(data, batch_size=None, num_workers=workers))


def seed_of(sample: dict[str, Any]) -> int:
    """Which photo a sample is."""
    return next(seed for seed in range(1000) if torch.equal(as_bytes(photo(seed)), sample["pixel_values"]))


def test_a_batch_of_samples_is_what_they_are_one_by_one() -> None:
    data = samples(12, set())
    assert len(data) == 12
    together = data.__getitems__([3, 0, 11])
    assert [seed_of(sample) for sample in together] == [3, 0, 11]
    assert [sample["labels"] for sample in together] == [3, 0, 1]
    for index, sample in zip([3, 0, 11], together, strict=True):
        assert torch.equal(data[index]["pixel_values"], sample["pixel_values"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_ends_with_its_name_and_the_fix_in_one_line(workers: int) -> None:
    with pytest.raises(BrokenImageError) as raised:
        list(DataLoader(samples(8, {5}), batch_size=4, num_workers=workers))
    message = str(raised.value)
    assert message.startswith("photos/5.png (image 5 of the train part): cannot be read as an image: ")
    assert message.endswith("Replace or remove it, or set skip_broken_images: true.")
    assert "\n" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_of_a_stream_ends_with_its_name_and_the_fix_in_one_line(workers: int, tmp_path: Path) -> None:
    with pytest.raises(BrokenImageError) as raised:
        loaded(streamed(tmp_path, 8, {5}, shards=2), workers)
    message = str(raised.value)
    assert message.startswith("photos/5.png (image ")
    assert message.endswith("Replace or remove it, or set skip_broken_images: true.")
    assert "\n" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_readable_image_takes_the_place_of_a_broken_one_while_training(workers: int) -> None:
    found = loaded(samples(12, {2, 3, 11}, skip_broken=True), workers)
    assert [seed_of(sample) for sample in found] == [0, 1, 4, 4, 4, 5, 6, 7, 8, 9, 10, 0]
    assert [int(sample["labels"]) for sample in found] == [0, 1, 4, 4, 4, 5, 6, 7, 8, 9, 0, 0]


def test_a_broken_image_is_black_and_does_not_count_in_evaluation() -> None:
    processor = make_image_processor(AutoConfig.for_model("deit", image_size=16))
    data = ImageSamples(
        rows(3, {1}),
        "image",
        "label",
        EvaluationTransform(processor),
        part="evaluation",
        skip_broken=True,
        replace=False,
    )
    kept, broken, also_kept = data.__getitems__([0, 1, 2])
    black = EvaluationTransform(processor)([Image.new("RGB", (30, 30))])[0]
    assert torch.equal(broken["pixel_values"], black)
    assert [kept["labels"], broken["labels"], also_kept["labels"]] == [0, IGNORED_LABEL, 2]
    assert not torch.equal(kept["pixel_values"], black)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_leaves_broken_images_out(workers: int, tmp_path: Path) -> None:
    found = loaded(streamed(tmp_path, 12, {2, 3, 11}, shards=2, skip_broken=True), workers)
    assert sorted(seed_of(sample) for sample in found) == [0, 1, 4, 5, 6, 7, 8, 9, 10]
    for sample in found:
        assert sample["labels"] == seed_of(sample) % 10


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_counted_once_however_often_and_wherever_it_is_read(workers: int, replace: bool) -> None:
    data = samples(24, {2, 3, 11, 23}, skip_broken=True, replace=replace)
    for passes in range(3):
        loaded(data, workers)
        assert data.broken.total == 4, passes


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_of_a_stream_is_counted_once_however_often_and_wherever_it_is_read(
    workers: int, tmp_path: Path
) -> None:
    data = streamed(tmp_path, 24, {2, 3, 11, 23}, shards=2, skip_broken=True)
    for passes in range(3):
        loaded(data, workers)
        assert data.broken.total == 4, passes


def test_each_broken_image_is_named_in_a_warning_once(caplog: pytest.LogCaptureFixture) -> None:
    data = samples(6, {2, 3}, skip_broken=True)
    with caplog.at_level(logging.WARNING, logger="nio_hf"):
        for _ in range(2):
            loaded(data, 0)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["Skipped"] * 2
    for index in (2, 3):
        assert caplog.text.count(f"photos/{index}.png (image {index} of the train part)") == 1


def test_counting_needs_broken_images_to_be_skipped() -> None:
    data = samples(4, {1})
    with pytest.raises(BrokenImageError):
        loaded(data, 0)
    assert data.broken.total == 0


def test_a_hundred_broken_images_in_a_row_are_too_many() -> None:
    data = samples(150, set(range(10, 109)), skip_broken=True)
    assert seed_of(data[10]) == 109
    with pytest.raises(DataError) as raised:
        _ = samples(150, set(range(10, 110)), skip_broken=True)[10]
    assert str(raised.value) == (
        "the train part: 100 images in a row cannot be read. Check where the images are stored."
    )


def test_a_hundred_broken_images_in_a_row_of_a_stream_are_too_many(tmp_path: Path) -> None:
    for name, broken in (("a row", set(range(10, 109))), ("two rows", set(range(140)) - {70})):
        (tmp_path / name).mkdir()
        assert len(loaded(streamed(tmp_path / name, 150, broken, skip_broken=True), 0)) == 150 - len(broken)
    with pytest.raises(DataError, match="the train part: 100 images in a row cannot be read"):
        loaded(streamed(tmp_path, 150, set(range(10, 110)), skip_broken=True), 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_without_a_readable_image_is_refused(workers: int) -> None:
    with pytest.raises(DataError, match="the train part: 100 images in a row cannot be read") as raised:
        loaded(samples(3, {0, 1, 2}, skip_broken=True), workers)
    assert "\n" not in str(raised.value)
    assert not isinstance(raised.value, BrokenImageError)


def test_pixels_are_those_of_the_file() -> None:
    for sample, index in zip(loaded(samples(3, set()), 0), range(3), strict=True):
        np.testing.assert_array_equal(sample["pixel_values"].permute(1, 2, 0).numpy(), np.asarray(photo(index)))


@pytest.mark.parametrize("layout", ["as Pillow has it", "as torch has it", "both"])
@pytest.mark.parametrize("size", [(6, 5), (1, 1), (1, 9), (3, 3)])
def test_a_batch_holds_the_samples_in_their_order_whatever_lies_where_in_memory(
    layout: str, size: tuple[int, int]
) -> None:
    data = []
    for index in range(4):
        pixels = as_bytes(photo(index, *size))
        keeps = layout == "as Pillow has it" or (layout == "both" and index % 2)
        data.append({"pixel_values": pixels if keeps else pixels.contiguous(), "labels": index})
    for given in (data, data[:1]):
        batch = collate_images(given)
        assert torch.equal(batch["pixel_values"], torch.stack([sample["pixel_values"] for sample in given]))
        assert batch["pixel_values"].dtype == torch.uint8
        assert torch.equal(batch["labels"], torch.arange(len(given)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_collates_bytes_and_floats(workers: int) -> None:
    processor = make_image_processor(AutoConfig.for_model("vit", image_size=8))
    for transform, dtype in ((EvaluationTransform(processor), torch.float32), (as_they_are, torch.uint8)):
        data = ImageSamples(rows(7, set()), "image", "label", transform, part="train")
        batches = list(DataLoader(data, batch_size=4, num_workers=workers, collate_fn=collate_images))
        assert [len(batch["labels"]) for batch in batches] == [4, 3]
        assert {batch["pixel_values"].dtype for batch in batches} == {dtype}
        together = torch.cat([batch["pixel_values"] for batch in batches])
        assert torch.equal(together, torch.stack([data[index]["pixel_values"] for index in range(7)]))
