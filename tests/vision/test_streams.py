"""Streams: parts that share no sample whatever reads them, and errors while data are read."""

import http.server
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
from torch.utils.data import DataLoader

from nio_hf.errors import DataError
from nio_hf.recipe.settings import DataSettings
from nio_hf.vision.datasets import load_image_data
from nio_hf.vision.samples import ImageStream
from tests.vision.pictures import (
    as_they_are,
    encoded,
    photo,
    pixels_of,
    stored,
    write_folder,
    write_foreign_parquet,
    write_parquet,
    write_tar,
)

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

THREE = datasets.ClassLabel(names=["a", "b", "c"])
SHARDS, IMAGES = 4, 20
LABELS = [index % 3 for index in range(IMAGES)]
EVERYTHING = {pixels_of(photo(seed)) for seed in range(SHARDS * IMAGES)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Parquet files of images that are all different."""
    root = tmp_path_factory.mktemp("shards")
    return [write_parquet(root / f"{n}.parquet", LABELS, THREE, first_seed=n * IMAGES) for n in range(SHARDS)]


def streamed(files, name="parquet", seed=0, **settings):
    return load_image_data(DataSettings(dataset_name=name, data_files=files, streaming=True, **settings), seed)


def stream(data, part, **settings):
    return ImageStream(
        getattr(data, part), as_they_are, data.columns, classes=len(data.class_names), part=part, **settings
    )


def read(data, part, workers=0):
    """The pixels of each image of a part, as the workers of a data loader give them."""
    loader = DataLoader(stream(data, part), batch_size=None, num_workers=workers)
    return [sample["pixel_values"].permute(1, 2, 0).numpy().tobytes() for sample in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_is_in_one_of_the_parts_and_in_the_same_for_any_number_of_workers(workers, shards):
    data = streamed(shards, eval_fraction=0.3)
    trained, evaluated = read(data, "train", workers), read(data, "evaluation", workers)
    assert not set(trained) & set(evaluated)
    assert Counter(trained + evaluated) == Counter(EVERYTHING)
    assert set(evaluated) == set(read(data, "evaluation"))
    limited = streamed(shards, eval_fraction=0.3, max_train_samples=SHARDS * IMAGES)
    assert len(read(limited, "train", workers)) == len(trained), "a limit above what there is takes nothing away"


def test_the_parts_are_the_same_in_whatever_order_and_files_the_images_come(shards, tmp_path):
    seeds = np.random.default_rng(1).permutation(SHARDS * IMAGES).tolist() * 2
    images = [stored(encoded(photo(seed)), f"renamed/{number}.png") for number, seed in enumerate(seeds)]
    shuffled = write_parquet(tmp_path / "data.parquet", [0, 1] * (len(images) // 2), THREE, images=images)
    assert set(read(streamed(shards), "evaluation")) == set(read(streamed(shuffled), "evaluation"))
    trained, evaluated = (set(read(streamed(shuffled), part)) for part in ("train", "evaluation"))
    assert not trained & evaluated, "copies stay together"
    chosen = []
    for place in (tmp_path / "here", tmp_path / "there" / "deeper"):
        write_folder(place, images=20)
        folder = DataSettings(dataset_name="imagefolder", data_dir=str(place), streaming=True)
        chosen.append(set(read(load_image_data(folder), "evaluation")))
    assert chosen[0] == chosen[1]
    assert 0 < len(chosen[0]) < 20


def test_the_parts_depend_on_the_seed_and_their_sizes_on_the_fraction(shards):
    first, again, other = (set(read(streamed(shards, seed=seed), "evaluation")) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    for fraction in (0.1, 0.5, 0.8):
        share = len(read(streamed(shards, eval_fraction=fraction), "evaluation")) / (SHARDS * IMAGES)
        assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / (SHARDS * IMAGES)) ** 0.5


def test_an_epoch_shuffles_the_training_part_and_no_other(shards):
    data = streamed(shards)
    training = stream(data, "train")
    orders = []
    for epoch in (0, 1, 0):
        training.set_epoch(epoch)
        orders.append([sample["pixel_values"].numpy().tobytes() for sample in training])
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    assert read(data, "evaluation") == read(streamed(shards, shuffle_buffer_size=2), "evaluation")


@pytest.mark.parametrize("workers", [0, 2])
def test_no_more_samples_than_asked_for_are_read_and_the_same_each_epoch(workers, shards):
    data = streamed(shards, max_train_samples=21, max_eval_samples=4)
    first = read(data, "train", workers)
    assert len(first) == 21
    assert len(read(data, "evaluation", workers)) == 4
    assert not set(first) & set(read(data, "evaluation"))
    data.train.set_epoch(1)
    assert set(read(data, "train", workers)) == set(first)


def test_images_that_are_not_on_this_machine_are_read_from_their_address(tmp_path):
    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    files = sorted(write_folder(tmp_path / "photos", images=6).rglob("*.png"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        addresses = [f"http://127.0.0.1:{server.server_port}/{file.relative_to(tmp_path)}" for file in files]
        data = streamed(addresses, "imagefolder", eval_fraction=0.4)
        assert set(read(data, "train") + read(data, "evaluation")) == {pixels_of(photo(seed)) for seed in range(12)}
        server.shutdown()


@pytest.mark.parametrize("dtype", ["int64", "string"])
def test_classes_that_are_not_known_beforehand_are_asked_for(dtype, tmp_path):
    values = LABELS if dtype == "int64" else [str(label) for label in LABELS]
    with pytest.raises(DataError) as raised:
        streamed(write_parquet(tmp_path / "data.parquet", values, datasets.Value(dtype)))
    fix = "Set num_classes, or turn streaming off." if dtype == "int64" else "Turn streaming off."
    found = f"num_classes: 'label' of parquet holds {dtype}, and a stream is not read beforehand. {fix}"
    assert str(raised.value) == found


BAD_LABELS = {
    "beyond the classes": ([7, *LABELS], None),
    "unlabelled integers": ([-1, *LABELS], None),
    "unlabelled classes": ([-1, *LABELS], THREE),
    "none": ([None, *LABELS], THREE),
    "text": (["cat"] * IMAGES, datasets.Value("string")),
}


@pytest.mark.usefixtures("given_up_files")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [*BAD_LABELS, "tar"])
def test_a_label_that_is_none_of_the_classes_is_an_error_of_ours(kind, workers, tmp_path):
    if kind == "tar":
        samples = ({"png": encoded(photo(index)), "cls": b"7"} for index in range(IMAGES))
        data = streamed(write_tar(tmp_path / "data.tar", samples), "webdataset", num_classes=3)
    else:
        data = streamed(write_parquet(tmp_path / "data.parquet", *BAD_LABELS[kind]), num_classes=3)
    with pytest.raises(DataError) as raised:
        read(data, "train", workers) + read(data, "evaluation", workers)
    assert "label" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert kind != "beyond the classes" or "label 7" in str(raised.value)


@pytest.mark.usefixtures("given_up_files")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("name", "content"), [("parquet", b"PAR1 but nothing more"), ("webdataset", b"text" * 500)])
def test_a_file_that_cannot_be_read_in_the_middle_of_a_stream_is_an_error_of_ours(name, content, workers, tmp_path):
    if name == "parquet":
        first = write_parquet(tmp_path / "0.parquet", LABELS, THREE)
    else:
        first = write_tar(tmp_path / "0.tar", ({"png": encoded(photo(seed)), "cls": b"1"} for seed in range(20)))
    second = Path(first).with_stem("1")
    second.write_bytes(content)
    with pytest.raises(DataError, match=r"\A.+\Z"):
        read(streamed([first, str(second)], name, num_classes=3), "train", workers)


@pytest.mark.parametrize("missing", [stored(None), stored(b""), stored(None, "missing.png"), None])
def test_a_missing_or_empty_image_is_on_one_side_and_can_be_left_out(missing, tmp_path):
    images = [*(stored(encoded(photo(index))) for index in range(IMAGES - 1)), missing]
    file = tmp_path / "data.parquet"
    write = write_foreign_parquet if missing else partial(write_parquet, feature=THREE)
    written = write(file, LABELS, images=images)
    data = streamed(written, image_column="image", num_classes=3, eval_fraction=0.5)
    parts = [stream(data, part, skip_broken=True) for part in ("train", "evaluation")]
    assert sum(len(list(part)) for part in parts) == IMAGES - 1
    assert sum(part.skipped for part in parts) == 1
