"""Image data sets: digits, local folders, and what is wrong with others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from nio_hf.errors import DataError
from nio_hf.vision.datasets import digits, load_image_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four JPEG photos of noise for each of two classes."""
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(4):
            pixels = generator.integers(0, 256, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.jpg")
    return tmp_path / "images"


def test_digits_are_the_images_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    data = digits()
    assert len(data) == 1797
    for index in (0, 100, 1796):
        pixels = np.asarray(data[index]["image"], dtype=float)
        assert np.abs(pixels * 16 / 255 - bunch.images[index]).max() < 0.04
        assert data[index]["label"] == bunch.target[index]


def test_the_parts_share_no_sample_and_hold_every_class_alike() -> None:
    data = load_image_data("digits", eval_fraction=0.2, seed=1)
    assert len(data.train) + len(data.evaluation) == 1797
    rows = [{np.asarray(image).tobytes() for image in part["image"]} for part in (data.train, data.evaluation)]
    assert len(rows[0] & rows[1]) < 5, "a few digits are drawn twice in the data set itself"
    shares = [np.bincount(part["label"]) / len(part) for part in (data.train, data.evaluation)]
    assert np.abs(shares[0] - shares[1]).max() < 0.01
    assert data.class_names == tuple("0123456789")


def test_the_choice_of_the_part_depends_on_the_seed_alone() -> None:
    labels = [list(load_image_data("digits", seed=seed).evaluation["label"]) for seed in (1, 1, 2)]
    assert labels[0] == labels[1]
    assert labels[0] != labels[2]


def test_a_local_folder_of_images_is_a_data_set(folder: Path) -> None:
    data = load_image_data(str(folder), eval_fraction=0.5)
    assert data.class_names == ("cat", "dog")
    assert len(data.evaluation) == 4
    assert data.train[0][data.image_column].size == (10, 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_split": "training"}, "train_split: 'training' is no split of digits. Choose one of train"),
        ({"eval_split": "test"}, "eval_split: 'test' is no split"),
        ({"image_column": "picture"}, "column 'picture' of digits: no such column"),
        ({"label_column": "image"}, "column 'image' of digits: a column of type Image"),
        ({"eval_fraction": 0.0}, "eval_fraction: 0.0 of 1797 samples"),
        ({"eval_fraction": 1.5}, "eval_fraction: 1.5"),
        ({"eval_fraction": 0.0001}, "eval_fraction: 0.0001"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as raised:
        load_image_data("digits", **settings)
    assert message in str(raised.value)


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be loaded"):
        load_image_data(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be loaded"):
        load_image_data(str(tmp_path / "empty"))


def test_splits_with_other_classes_or_without_samples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = digits()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    other = datasets.Dataset.from_dict({"image": [], "label": []}, features=features)
    two = datasets.Dataset.from_dict({"image": [data[0]["image"]], "label": [1]}, features=features)
    splits = datasets.DatasetDict(train=data, test=two, empty=other)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args: splits)
    with pytest.raises(DataError, match="the classes of 'test' are not those of 'train'"):
        load_image_data("some/name", eval_split="test")
    with pytest.raises(DataError, match="the split 'empty' of some/name is empty"):
        load_image_data("some/name", eval_split="empty")
    splits["train"] = datasets.concatenate_datasets(
        [data, data.select_columns("image").rename_column("image", "more")], axis=1
    )
    with pytest.raises(DataError, match="image_column: 2 columns of type Image"):
        load_image_data("some/name")
