"""Samples for a data loader: images that can and cannot be read, in this process and in workers."""

import logging

import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoConfig

from nio_hf.errors import BrokenImageError, DataError
from nio_hf.vision.processors import EvaluationTransform, make_image_processor
from nio_hf.vision.samples import IGNORED_LABEL, ImageSamples, ImageStream, collate_images
from tests.vision.pictures import BROKEN, as_bytes, as_they_are, encoded, photo, stored, write_parquet

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

TEN = datasets.ClassLabel(num_classes=10)
WORKERS = pytest.mark.parametrize("workers", [0, 2])
BOTH = pytest.mark.parametrize("streaming", [False, True])


def rows(images, broken):
    """Images that are not decoded; image i is `photo(i)` of class i mod 10, or broken."""
    stored_images = [
        stored(BROKEN if index in broken else encoded(photo(index)), f"photos/{index}.png") for index in range(images)
    ]
    features = datasets.Features(image=datasets.Image(decode=False), label=TEN)
    labels = [index % 10 for index in range(images)]
    return datasets.Dataset.from_dict({"image": stored_images, "label": labels}, features=features)


def samples(images, broken, **settings):
    return ImageSamples(rows(images, broken), as_they_are, **{"part": "train", **settings})


def streamed(root, images, broken, shards=2, **settings):
    """The same images as a stream of shards, each with a part of the images in a row."""
    each = images // shards
    files = []
    for shard in range(shards):
        part = rows(images, broken).select(range(shard * each, (shard + 1) * each))
        files.append(write_parquet(root / f"{shard}.parquet", part["label"], TEN, images=part["image"]))
    stream = datasets.load_dataset("parquet", data_files=files, streaming=True)["train"]
    undecoded = stream.cast_column("image", datasets.Image(decode=False))
    return ImageStream(undecoded, as_they_are, classes=10, part="train", **settings)


def made(streaming, root, *arguments, **settings):
    return streamed(root, *arguments, **settings) if streaming else samples(*arguments, **settings)


def loaded(data, workers):
    return list(DataLoader(data, batch_size=None, num_workers=workers))


def seed_of(sample):
    return next(seed for seed in range(1000) if torch.equal(as_bytes(photo(seed)), sample["pixel_values"]))


def test_a_batch_of_samples_is_what_they_are_one_by_one():
    data = samples(12, set())
    assert len(data) == 12
    together = data.__getitems__([3, 0, 11])
    assert [seed_of(sample) for sample in together] == [3, 0, 11]
    assert [sample["labels"] for sample in together] == [3, 0, 1]
    for index, sample in zip([3, 0, 11], together, strict=True):
        assert torch.equal(data[index]["pixel_values"], sample["pixel_values"])
    assert "seeds" not in data[0]
    seeded = samples(3, set(), seeded=True)
    torch.manual_seed(0)
    first, second = seeded[0]["seeds"], seeded[0]["seeds"]
    torch.manual_seed(0)
    assert seeded[0]["seeds"] == first != second, "from the generator of torch"


@WORKERS
@BOTH
def test_a_broken_image_ends_with_its_name_and_the_fix_in_one_line(streaming, workers, tmp_path):
    data = made(streaming, tmp_path, 8, {5})
    with pytest.raises(BrokenImageError) as raised:
        loaded(data, workers)
    message = str(raised.value)
    assert message.startswith("photos/5.png (image ")
    assert streaming or message.startswith("photos/5.png (image 5 of the train part): cannot be read as an image: ")
    assert message.endswith("Replace or remove it, or set skip_broken_images: true.")
    assert "\n" not in message
    assert data.skipped == 0


@WORKERS
def test_the_next_readable_image_takes_the_place_of_a_broken_one_or_a_stream_leaves_it_out(workers, tmp_path):
    found = loaded(samples(12, {2, 3, 11}, skip_broken=True), workers)
    assert [seed_of(sample) for sample in found] == [0, 1, 4, 4, 4, 5, 6, 7, 8, 9, 10, 0]
    assert [int(sample["labels"]) for sample in found] == [0, 1, 4, 4, 4, 5, 6, 7, 8, 9, 0, 0]
    found = loaded(streamed(tmp_path, 12, {2, 3, 11}, skip_broken=True), workers)
    assert sorted(seed_of(sample) for sample in found) == [0, 1, 4, 5, 6, 7, 8, 9, 10]
    assert all(sample["labels"] == seed_of(sample) % 10 for sample in found)


def test_a_broken_image_is_black_and_does_not_count_in_evaluation():
    transform = EvaluationTransform(make_image_processor(AutoConfig.for_model("deit", image_size=16)))
    data = ImageSamples(rows(3, {1}), transform, part="evaluation", skip_broken=True)
    kept, broken, also_kept = data.__getitems__([0, 1, 2])
    black = transform([Image.new("RGB", (30, 30))])[0]
    assert torch.equal(broken["pixel_values"], black)
    assert [kept["labels"], broken["labels"], also_kept["labels"]] == [0, IGNORED_LABEL, 2]
    assert not torch.equal(kept["pixel_values"], black)


@WORKERS
@pytest.mark.parametrize("kind", ["train", "evaluation", "stream"])
def test_a_broken_image_is_counted_and_named_once_however_often_and_wherever_it_is_read(
    kind, workers, tmp_path, caplog
):
    settings = {"skip_broken": True} if kind == "stream" else {"skip_broken": True, "part": kind}
    data = made(kind == "stream", tmp_path, 24, {2, 3, 11, 23}, **settings)
    with caplog.at_level(logging.WARNING, logger="nio_hf"):
        for _ in range(2):
            loaded(data, workers)
            assert data.skipped == 4
    if workers == 0:
        assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["Skipped"] * 4
        assert all(caplog.text.count(f"photos/{index}.png (image ") == 1 for index in (2, 3, 11, 23))


def test_a_hundred_broken_images_in_a_row_are_too_many(tmp_path):
    assert seed_of(samples(150, set(range(10, 109)), skip_broken=True)[10]) == 109
    wanted = r"^the train part: 100 images in a row cannot be read\. Check where the images are stored\.$"
    with pytest.raises(DataError, match=wanted):
        _ = samples(150, set(range(10, 110)), skip_broken=True)[10]
    with pytest.raises(DataError, match=wanted):
        loaded(samples(3, {0, 1, 2}, skip_broken=True), 1)
    for name, broken in (("a row", set(range(10, 109))), ("two rows", set(range(140)) - {70})):
        (tmp_path / name).mkdir()
        data = streamed(tmp_path / name, 150, broken, shards=1, skip_broken=True)
        assert len(loaded(data, 0)) == 150 - len(broken)
    with pytest.raises(DataError, match=wanted):
        loaded(streamed(tmp_path, 150, set(range(10, 110)), shards=1, skip_broken=True), 0)


@pytest.mark.parametrize("layout", ["as Pillow has it", "as torch has it", "both"])
@pytest.mark.parametrize("size", [(6, 5), (1, 1), (1, 9), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_batch_holds_the_samples_in_their_order_whatever_lies_where_in_memory(layout, size, dtype):
    data = []
    for index in range(4):
        pixels = as_bytes(photo(index, *size)).to(dtype)
        keeps = layout == "as Pillow has it" or (layout == "both" and index % 2)
        data.append({"pixel_values": pixels if keeps else pixels.contiguous(), "labels": index, "seeds": 2**61 + index})
    for given in (data, data[:1]):
        batch = collate_images(given)
        assert torch.equal(batch["pixel_values"], torch.stack([sample["pixel_values"] for sample in given]))
        assert batch["pixel_values"].dtype == dtype
        assert torch.equal(batch["labels"], torch.arange(len(given)))
        assert torch.equal(batch["seeds"], 2**61 + torch.arange(len(given)))
