"""Image data sets of every kind: their columns and classes, their parts, and what is wrong with others."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from nio_hf.errors import DataError
from nio_hf.vision.columns import find_image_column, find_label_column
from nio_hf.vision.datasets import ImageData, load_image_data
from nio_hf.vision.images import read_image
from nio_hf.vision.sources import digits
from tests.vision.pictures import (
    encoded,
    photo,
    stored,
    write_folder,
    write_foreign_parquet,
    write_parquet,
    write_tar,
)

THREE = datasets.ClassLabel(names=["a", "b", "c"])
TEXT = datasets.Value("string")
LABELS = [index % 3 for index in range(30)]


def refused(name: str = "parquet", **settings: Any) -> str:
    """The message of a data set that is refused, in one line."""
    with pytest.raises(DataError) as raised:
        load_image_data(name, **settings)
    message = str(raised.value)
    assert "\n" not in message
    return message


def pixels(data: ImageData, part: str) -> list[bytes]:
    rows = getattr(data, part)
    return [np.asarray(read_image(row[data.image_column], "image")).tobytes() for row in rows]


def labels(data: ImageData, part: str) -> list[int]:
    return [row[data.label_column] for row in getattr(data, part)]


# The digits of scikit-learn


def test_digits_are_the_images_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    data = digits()
    assert len(data) == 1797
    for index in (0, 100, 1796):
        values = np.asarray(data[index]["image"], dtype=float)
        assert np.abs(values * 16 / 255 - bunch.images[index]).max() < 0.04
        assert data[index]["label"] == bunch.target[index]


def contents(data: ImageData, part: str) -> list[bytes]:
    """The files of the images of a part."""
    return [row["bytes"] for row in getattr(data, part)[data.image_column]]


def test_the_parts_share_no_sample_and_hold_every_class_alike() -> None:
    data = load_image_data("digits", eval_fraction=0.2, seed=1)
    assert len(data.train) + len(data.evaluation) == 1797
    trained, evaluated = set(contents(data, "train")), set(contents(data, "evaluation"))
    assert len(trained & evaluated) < 5, "a few digits are drawn twice in the data set itself"
    shares = [np.bincount(part["label"]) / len(part) for part in (data.train, data.evaluation)]
    assert np.abs(shares[0] - shares[1]).max() < 0.01
    assert data.class_names == tuple("0123456789")


def test_the_choice_of_the_part_depends_on_the_seed_alone() -> None:
    chosen = [contents(load_image_data("digits", seed=seed), "evaluation") for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1]
    assert set(chosen[0]) != set(chosen[2])


def test_as_many_samples_as_asked_for_are_chosen_at_random_and_from_the_same_parts() -> None:
    whole = load_image_data("digits", seed=3)
    few = load_image_data("digits", seed=3, max_train_samples=200, max_eval_samples=100)
    assert (len(few.train), len(few.evaluation)) == (200, 100)
    assert set(contents(few, "train")) <= set(contents(whole, "train"))
    assert set(contents(few, "evaluation")) <= set(contents(whole, "evaluation"))
    assert set(few.train["label"]) == set(range(10))
    assert contents(few, "train")[:50] != contents(whole, "train")[:50]
    more = load_image_data("digits", seed=3, max_train_samples=10_000, max_eval_samples=10_000)
    assert (len(more.train), len(more.evaluation)) == (len(whole.train), len(whole.evaluation))


# Formats


def folder(root: Path) -> dict[str, Any]:
    return {"name": "imagefolder", "data_dir": str(write_folder(root / "photos", "abc", images=10))}


def folder_by_name(root: Path) -> dict[str, Any]:
    return {"name": str(write_folder(root / "photos", "abc", images=10))}


def parquet(root: Path) -> dict[str, Any]:
    return {"name": "parquet", "data_files": write_parquet(root / "data.parquet", LABELS, THREE)}


def parquet_of_integers(root: Path) -> dict[str, Any]:
    return {"name": "parquet", "data_files": write_parquet(root / "data.parquet", LABELS), "num_classes": 3}


def webdataset(root: Path) -> dict[str, Any]:
    samples = ({"png": encoded(photo(index)), "cls": str(index % 3).encode()} for index in range(30))
    return {"name": "webdataset", "data_files": write_tar(root / "data.tar", samples), "num_classes": 3}


FORMATS: list[Callable[[Path], dict[str, Any]]] = [
    folder,
    folder_by_name,
    parquet,
    parquet_of_integers,
    webdataset,
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("make", FORMATS)
def test_every_format_gives_every_image_with_its_label_in_one_of_the_parts(
    make: Callable[[Path], dict[str, Any]], streaming: bool, tmp_path: Path
) -> None:
    data = load_image_data(**make(tmp_path), streaming=streaming, eval_fraction=0.3)
    trained, evaluated = pixels(data, "train"), pixels(data, "evaluation")
    assert len(trained) + len(evaluated) == 30
    assert not set(trained) & set(evaluated)
    by_folder = make in (folder, folder_by_name)
    wanted = {np.asarray(photo(seed)).tobytes(): seed // 10 if by_folder else seed % 3 for seed in range(30)}
    found = dict(zip(trained + evaluated, labels(data, "train") + labels(data, "evaluation"), strict=True))
    assert found == wanted
    assert data.class_names == (("a", "b", "c") if by_folder or make is parquet else ("0", "1", "2"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_validation_split_is_evaluated_on_and_all_of_the_training_split_trained_on(
    streaming: bool, tmp_path: Path
) -> None:
    for number, split in enumerate(("train", "validation", "test")):
        write_folder(tmp_path / split, images=4, first_seed=100 * number)
    data = load_image_data("imagefolder", data_dir=str(tmp_path), streaming=streaming)
    assert (len(pixels(data, "train")), len(pixels(data, "evaluation"))) == (8, 8)
    assert np.asarray(photo(100)).tobytes() in pixels(data, "evaluation")
    other = load_image_data("imagefolder", data_dir=str(tmp_path), streaming=streaming, eval_split="test")
    assert np.asarray(photo(200)).tobytes() in pixels(other, "evaluation")


def test_files_of_each_split_are_named_one_by_one(tmp_path: Path) -> None:
    files = {
        "fit": [write_parquet(tmp_path / f"{part}.parquet", LABELS, THREE, first_seed=50 * part) for part in (0, 1)],
        "held": write_parquet(tmp_path / "held.parquet", LABELS, THREE, first_seed=100),
    }
    data = load_image_data("parquet", data_files=files, train_split="fit", eval_split="held")
    assert (len(data.train), len(data.evaluation)) == (60, 30)


def test_images_stay_as_they_are_stored_until_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    data = load_image_data(**folder(tmp_path / "photos"))
    assert data.train[0]["image"].keys() == {"bytes", "path"}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_zip_archive_of_images_is_read_as_a_folder_is(streaming: bool, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr(
            "metadata.csv",
            "\n".join(["file_name,label", *(f"{number}/photo.png,{number % 2}" for number in range(30))]),
        )
        for number in range(30):
            archive.writestr(f"{number}/photo.png", encoded(photo(number)))
    data = load_image_data(
        "imagefolder", data_files={"train": str(tmp_path / "photos.zip")}, num_classes=2, streaming=streaming
    )
    trained, evaluated = pixels(data, "train"), pixels(data, "evaluation")
    assert len(trained + evaluated) == 30
    assert evaluated
    assert not set(trained) & set(evaluated)


def test_what_is_no_data_set_is_refused_with_the_setting_to_look_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    missing, empty = str(tmp_path / "missing"), str(tmp_path / "empty")
    assert refused(missing).startswith(f"dataset_name: '{missing}' cannot be loaded: ")
    assert refused(empty).startswith(f"dataset_name: '{empty}' cannot be loaded: ")
    for streaming in (False, True):
        for data_dir in (missing, empty):
            message = refused("imagefolder", data_dir=data_dir, streaming=streaming)
            assert message.startswith(f"data_dir: '{data_dir}' cannot be loaded as 'imagefolder': ")
            assert message.endswith("Give a folder with images in one folder per class.")
        message = refused(data_files=f"{missing}.parquet", streaming=streaming)
        assert message.startswith(f"data_files: '{missing}.parquet' cannot be loaded as 'parquet': ")


@pytest.mark.parametrize("name", ["imagefolder", "parquet", "webdataset"])
def test_a_format_alone_is_refused_whatever_files_lie_where_one_happens_to_be(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path)
    write_parquet(tmp_path / "data.parquet", LABELS, THREE)
    monkeypatch.chdir(tmp_path)
    assert refused(name) == f"dataset_name: '{name}' without data_dir or data_files. Give one of them with it."


@pytest.mark.usefixtures("given_up_files")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("content", [b"", b"PAR1 but nothing more", b"\x00" * 1024, b"text" * 500])
@pytest.mark.parametrize("name", ["parquet", "webdataset"])
def test_a_file_that_is_not_what_it_should_be_is_refused(
    name: str, content: bytes, streaming: bool, tmp_path: Path
) -> None:
    file = tmp_path / ("data.parquet" if name == "parquet" else "data.tar")
    file.write_bytes(content)
    assert refused(name, data_files=str(file), streaming=streaming, num_classes=2).startswith("data_files: ")


def test_a_folder_of_images_without_classes_has_no_labels(tmp_path: Path) -> None:
    for seed in range(5):
        photo(seed).save(tmp_path / f"{seed}.png")
    message = refused("imagefolder", data_dir=str(tmp_path))
    assert message.startswith(f"data_dir: '{tmp_path}' has 5 images that are in no folder of a class. Put the images ")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_empty_class_folders_are_reported(
    by_name: bool, streaming: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_folder(tmp_path / "photos")
    (root / "bird").mkdir()
    settings = {"name": str(root)} if by_name else {"name": "imagefolder", "data_dir": str(root)}
    with caplog.at_level(logging.WARNING, logger="nio_hf"):
        data = load_image_data(**settings, streaming=streaming)
    assert data.class_names == ("cat", "dog")
    assert f"No class is made of empty folders: {root / 'bird'}." in caplog.text


def test_a_folder_of_nothing_but_empty_class_folders_is_refused(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    assert "doesn't contain any data files" in refused("imagefolder", data_dir=str(tmp_path))


# Splits


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_split": "training"}, "train_split: 'training' is no split of digits. Choose one of train."),
        ({"eval_split": "test"}, "eval_split: 'test' is no split of digits. Choose one of train."),
        ({"image_column": "picture"}, "image_column: 'picture' is no column of digits. Name one of image (Image)"),
        ({"label_column": "class"}, "label_column: 'class' is no column of digits. Name one of image (Image)"),
        ({"label_column": "image"}, "label_column: 'image' of digits holds Image. Name a column of class labels: "),
        ({"image_column": "label"}, "image_column: 'label' of digits holds ClassLabel. Name a column of images: "),
        ({"eval_fraction": 0.0}, "eval_fraction: 0.0. Give a part in (0, 1), or an eval_split."),
        ({"eval_fraction": 1.5}, "eval_fraction: 1.5. Give a part in (0, 1), or an eval_split."),
        ({"eval_fraction": float("nan")}, "eval_fraction: nan. Give a part in (0, 1), or an eval_split."),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(settings: dict[str, Any], message: str) -> None:
    for streaming in (False, True):
        assert refused("digits", streaming=streaming, **settings).startswith(message)


def test_a_part_too_small_for_every_class_is_refused() -> None:
    message = refused("digits", eval_fraction=0.0001)
    assert message.startswith("eval_fraction: 0.0001 of 1797 samples of digits cannot be set aside (")
    assert message.endswith("Give a part in (0, 1) that holds a sample of every class, or an eval_split.")


def test_a_class_of_one_image_cannot_be_divided(tmp_path: Path) -> None:
    message = refused(data_files=write_parquet(tmp_path / "data.parquet", [*[0, 1] * 10, 2], THREE))
    assert message.startswith("eval_fraction: 0.2 of 21 samples of parquet cannot be set aside (")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_without_samples_is_refused(streaming: bool, tmp_path: Path) -> None:
    full, empty = (write_parquet(tmp_path / f"{n}.parquet", [0, 1, 2] * n, THREE) for n in (4, 0))
    with pytest.raises(DataError):
        load_image_data("parquet", data_files={"train": empty, "validation": full}, streaming=streaming)
    with pytest.raises(DataError):
        load_image_data("parquet", data_files={"train": full, "validation": empty}, streaming=streaming)


# Columns


def rows_of(**features: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict({name: [] for name in features}, features=datasets.Features(features))


def test_columns_are_found_by_the_type_of_their_features() -> None:
    rows = rows_of(id=datasets.Value("int64"), scan=datasets.Image(), kind=THREE, label=datasets.Value("int64"))
    assert find_image_column(rows, None, "scans") == "scan"
    assert find_label_column(rows, None, "scans") == "kind"
    assert find_label_column(rows, "label", "scans") == "label"


@pytest.mark.parametrize("name", ["label", "labels", "cls", "class"])
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "string", "large_string"])
def test_a_column_that_is_called_a_label_is_one_where_no_column_has_the_type(name: str, dtype: str) -> None:
    rows = rows_of(image=datasets.Image(), id=datasets.Value("int64"), **{name: datasets.Value(dtype)})
    assert find_label_column(rows, None, "scans") == name


@pytest.mark.parametrize("dtype", ["binary", "large_binary", "string", "large_string"])
def test_a_named_column_of_encoded_images_or_their_paths_is_one_of_images(dtype: str) -> None:
    assert find_image_column(rows_of(file=datasets.Value(dtype)), "file", "scans") == "file"


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"label": THREE}, "image_column: no columns of images in scans. Name one of its columns: label (ClassLabel)."),
        (
            {"left": datasets.Image(), "right": datasets.Image(), "label": THREE},
            "image_column: 2 columns of images in scans. Name one of its columns: "
            "left (Image), right (Image), label (ClassLabel).",
        ),
        (
            {"image": datasets.Image(), "target": datasets.Value("int64")},
            "label_column: no columns of class labels in scans. Name one of its columns: "
            "image (Image), target (int64).",
        ),
        (
            {"image": datasets.Image(), "label": datasets.Value("float32")},
            "label_column: no columns of class labels in scans. Name one of its columns: "
            "image (Image), label (float32).",
        ),
        (
            {"image": datasets.Image(), "coarse": THREE, "fine": THREE},
            "label_column: 2 columns of class labels in scans. Name one of its columns: "
            "image (Image), coarse (ClassLabel), fine (ClassLabel).",
        ),
        (
            {"image": datasets.Image(), "label": datasets.Value("int64"), "class": datasets.Value("string")},
            "label_column: 2 columns of class labels in scans. Name one of its columns: "
            "image (Image), label (int64), class (string).",
        ),
    ],
)
def test_no_column_or_several_are_refused_with_all_of_them(features: dict[str, Any], message: str) -> None:
    rows = rows_of(**features)
    with pytest.raises(DataError) as raised:
        (find_image_column if message.startswith("image") else find_label_column)(rows, None, "scans")
    assert str(raised.value) == message


def test_images_of_somebody_who_does_not_know_the_image_type_are_read_where_they_are_named(tmp_path: Path) -> None:
    images = [stored(encoded(photo(index))) for index in range(30)]
    file = write_foreign_parquet(tmp_path / "data.parquet", LABELS, images)
    assert refused(data_files=file).startswith("image_column: no columns of images in parquet.")
    data = load_image_data("parquet", data_files=file, image_column="image")
    assert set(pixels(data, "train") + pixels(data, "evaluation")) == {
        np.asarray(photo(index)).tobytes() for index in range(30)
    }


def test_a_column_of_paths_is_read_from_the_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", ("all",), images=6)
    lines = [f"{tmp_path / 'photos' / 'all' / f'{index}.png'},{'xy'[index % 2]}" for index in range(6)]
    (tmp_path / "list.csv").write_text("\n".join(["file,label", *lines]))
    data = load_image_data("csv", data_files=str(tmp_path / "list.csv"), image_column="file", eval_fraction=0.5)
    assert data.class_names == ("x", "y")
    assert len(pixels(data, "train")) == 3


def test_one_column_cannot_be_the_images_and_the_labels(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("\n".join(["label,id", "x,1", "y,2", "x,3", "y,4"]))
    settings = {"data_files": str(tmp_path / "list.csv"), "image_column": "label", "label_column": "label"}
    assert "label" in refused("csv", **settings)


# Labels


def test_integers_are_classes_from_zero_to_the_largest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="nio_hf"):
        data = load_image_data("parquet", data_files=write_parquet(tmp_path / "data.parquet", [1, 2, 4] * 10))
    assert data.class_names == ("0", "1", "2", "3", "4")
    assert "parquet has no image of classes '0', '3': the model cannot learn it." in caplog.text


def test_texts_are_classes_in_alphabetical_order(tmp_path: Path) -> None:
    names = ["zebra", "ant", "cow"] * 10
    data = load_image_data("parquet", data_files=write_parquet(tmp_path / "data.parquet", names, TEXT))
    assert data.class_names == ("ant", "cow", "zebra")
    numbers = labels(data, "train") + labels(data, "evaluation")
    found = dict(zip(pixels(data, "train") + pixels(data, "evaluation"), numbers, strict=True))
    for seed, name in enumerate(names):
        assert data.class_names[found[np.asarray(photo(seed)).tobytes()]] == name


def test_every_label_is_written_as_an_integer_of_its_class(tmp_path: Path) -> None:
    for feature, values in (
        (THREE, LABELS),
        (None, LABELS),
        (datasets.Value("uint8"), LABELS),
        (TEXT, list("abc" * 10)),
    ):
        file = write_parquet(tmp_path / "data.parquet", values, feature)
        data = load_image_data("parquet", data_files=file)
        assert data.train.features["label"] == datasets.ClassLabel(names=list(data.class_names))
        assert sorted(labels(data, "evaluation")) == [0, 0, 1, 1, 2, 2]


def test_a_class_without_an_image_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_parquet(tmp_path / "data.parquet", [0, 1] * 10, THREE)
    with caplog.at_level(logging.WARNING, logger="nio_hf"):
        data = load_image_data("parquet", data_files=file)
    assert data.class_names == ("a", "b", "c")
    assert "parquet has no image of class 'c': the model cannot learn it." in caplog.text


def test_a_class_that_is_trained_but_not_evaluated_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / "train", ("bird", "cat", "dog"))
    write_folder(tmp_path / "validation", ("cat", "dog"))
    with caplog.at_level(logging.WARNING, logger="nio_hf"):
        load_image_data("imagefolder", data_dir=str(tmp_path))
    assert "No image to evaluate on of class 'bird'." in caplog.text


UNLABELLED: dict[str, tuple[list[Any], Any]] = {
    "-1 of named classes": ([-1, *LABELS], THREE),
    "-1 of integers": ([-1, *LABELS], None),
    "-1 of all": ([-1] * 30, None),
    "none of named classes": ([None, *LABELS], THREE),
    "none of integers": ([None, *LABELS], None),
    "none of texts": ([None, *list("abc" * 10)], TEXT),
    "none of all": ([None] * 30, THREE),
}


@pytest.mark.parametrize("kind", UNLABELLED)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_samples_without_a_label_are_refused(kind: str, split: str, tmp_path: Path) -> None:
    values, feature = UNLABELLED[kind]
    labelled = [value for value in values if value not in (None, -1)] or LABELS
    other = "validation" if split == "train" else "train"
    files = {
        split: write_parquet(tmp_path / "unlabelled.parquet", values, feature),
        other: write_parquet(tmp_path / "labelled.parquet", labelled, feature),
    }
    message = refused(data_files=files)
    assert "label" in message
    assert message.endswith("Choose a split whose samples have labels.")


@pytest.mark.parametrize("kind", UNLABELLED)
def test_samples_without_a_label_are_refused_where_a_part_is_to_be_set_aside(kind: str, tmp_path: Path) -> None:
    values, feature = UNLABELLED[kind]
    assert refused(data_files=write_parquet(tmp_path / "data.parquet", values * 2, feature)).endswith(
        "Choose a split whose samples have labels."
    )


def test_labels_beyond_the_number_of_classes_are_refused(tmp_path: Path) -> None:
    for feature in (None, datasets.Value("int32"), datasets.Value("uint8")):
        file = write_parquet(tmp_path / "data.parquet", LABELS, feature)
        message = refused(data_files=file, num_classes=2)
        assert re.search(r"label of 'train' of parquet: a label that is none of the 2 classes", message)


def test_more_classes_than_have_images_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_parquet(tmp_path / "data.parquet", LABELS)
    with caplog.at_level(logging.WARNING, logger="nio_hf"):
        assert load_image_data("parquet", data_files=file, num_classes=5).class_names == tuple("01234")
    assert "parquet has no image of classes '3', '4'" in caplog.text


@pytest.mark.parametrize(
    ("trained", "evaluated", "feature"),
    [
        (LABELS, [0, 1, 2, 3], None),
        ([0, 2] * 10, [0, 1, 2], None),
        ([0, 1] * 10, [0, 1, 2], None),
        ([0, 1] * 10, [0, 1, 2], THREE),
        (["cat", "dog"] * 10, ["cat", "fox"], TEXT),
    ],
)
def test_classes_that_are_evaluated_but_not_trained_are_refused(
    trained: list[Any], evaluated: list[Any], feature: Any, tmp_path: Path
) -> None:
    files = {
        "train": write_parquet(tmp_path / "train.parquet", trained, feature),
        "validation": write_parquet(tmp_path / "validation.parquet", evaluated, feature),
    }
    message = refused(data_files=files)
    assert "class" in message
    assert "parquet" in message


def test_a_folder_of_validation_with_a_class_more_is_refused_with_its_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "validation", ("bird", "cat", "dog"))
    assert refused("imagefolder", data_dir=str(tmp_path)) == (
        "classes of imagefolder: images to evaluate on but none to train on of class 'bird'. "
        "Give two splits of the same classes."
    )


def test_splits_whose_classes_have_another_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [Image.new("L", (2, 2))] * 2
    other = datasets.ClassLabel(names=["b", "a", "c"])
    splits = datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"image": images, "label": [0, 1]},
                features=datasets.Features(image=datasets.Image(), label=feature),
            )
            for split, feature in (("train", THREE), ("validation", other))
        }
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: splits)
    assert refused("some/name") == (
        "'validation' of some/name: other classes than those of the training split, or in another order. "
        "Give two splits of the same classes."
    )


def test_many_missing_classes_are_not_all_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_parquet(tmp_path / "data.parquet", [0, 1] * 10)
    with caplog.at_level(logging.WARNING, logger="nio_hf"):
        load_image_data("parquet", data_files=file, num_classes=1000)
    assert "classes '2', '3', '4', '5', '6' and 993 more" in caplog.text


def test_a_split_without_labels_says_so(tmp_path: Path) -> None:
    samples = [{"jpg": encoded(photo(index), "JPEG")} for index in range(4)]
    assert refused("webdataset", data_files=write_tar(tmp_path / "data.tar", samples)) == (
        "label_column: no columns of class labels in webdataset. Name one of its columns: "
        "jpg (Image), __key__ (string), __url__ (string)."
    )
