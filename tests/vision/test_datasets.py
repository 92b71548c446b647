"""Image data sets of every kind: columns, classes and parts, and the refusal of broken ones."""

import logging
import zipfile
from collections import Counter

import datasets
import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from nio_hf.errors import DataError
from nio_hf.recipe.settings import DataSettings
from nio_hf.vision.datasets import digits, find_image_columns, load_image_data
from nio_hf.vision.samples import read_image
from tests.vision.pictures import encoded, photo, pixels_of, write_folder, write_parquet, write_tar

THREE = datasets.ClassLabel(names=["a", "b", "c"])
TEXT = datasets.Value("string")
LABELS = [index % 3 for index in range(30)]
STREAMED = pytest.mark.parametrize("streaming", [False, True])


def load(name="parquet", seed=0, **settings):
    return load_image_data(DataSettings(dataset_name=name, **settings), seed)


def refused(name="parquet", **settings):
    """The message of a data set that is refused, in one line."""
    with pytest.raises(DataError) as raised:
        load(name, **settings)
    message = str(raised.value)
    assert "\n" not in message
    return message


def pixels(data, part):
    return [np.asarray(read_image(row[data.columns[0]], "image")).tobytes() for row in getattr(data, part)]


def labels(data, part):
    return [row[data.columns[1]] for row in getattr(data, part)]


def test_digits_are_the_images_of_scikit_learn():
    from sklearn.datasets import load_digits

    bunch, data = load_digits(), digits()
    assert len(data) == 1797
    for index in (0, 100, 1796):
        values = np.asarray(data[index]["image"], dtype=float)
        assert np.abs(values * 16 / 255 - bunch.images[index]).max() < 0.04
        assert data[index]["label"] == bunch.target[index]


def test_parts_of_digits_are_a_choice_by_seed_of_every_class_alike_and_limits_take_some_of_them():
    def contents(data, part):
        return [row["bytes"] for row in getattr(data, part)["image"]]

    first, again, other = (load("digits", seed) for seed in (1, 1, 2))
    assert contents(first, "evaluation") == contents(again, "evaluation")
    assert set(contents(first, "evaluation")) != set(contents(other, "evaluation"))
    assert len(first.train) + len(first.evaluation) == 1797
    common = set(contents(first, "train")) & set(contents(first, "evaluation"))
    assert len(common) < 5, "a few digits are drawn twice in the data set itself"
    shares = [np.bincount(part["label"]) / len(part) for part in (first.train, first.evaluation)]
    assert np.abs(shares[0] - shares[1]).max() < 0.01
    assert first.class_names == tuple("0123456789")
    few = load("digits", 1, max_train_samples=200, max_eval_samples=100)
    for part, count in (("train", 200), ("evaluation", 100)):
        assert len(getattr(few, part)) == count
        assert set(contents(few, part)) <= set(contents(first, part))
    assert set(few.train["label"]) == set(range(10))


def test_some_samples_of_a_split_are_the_same_for_every_seed(tmp_path):
    root = write_folder(tmp_path / "train", "abc", images=9).parent
    write_folder(root / "validation", "abc", images=9)
    parts = [load("imagefolder", seed, data_dir=str(root), max_eval_samples=8).evaluation for seed in (1, 2)]
    names = [[row["path"] for row in part["image"]] for part in parts]
    assert names[0] == names[1]
    assert len(names[0]) == 8


def write_zip(root):
    with zipfile.ZipFile(root / "photos.zip", "w") as archive:
        lines = ["file_name,label", *(f"{number}/photo.png,{number % 3}" for number in range(30))]
        archive.writestr("metadata.csv", "\n".join(lines))
        for number in range(30):
            archive.writestr(f"{number}/photo.png", encoded(photo(number)))
    return {"train": str(root / "photos.zip")}


SAMPLES = [{"png": encoded(photo(index)), "cls": str(index % 3).encode()} for index in range(30)]
FORMATS = {
    "folder": lambda root: {"name": "imagefolder", "data_dir": str(write_folder(root / "photos", "abc", images=10))},
    "folder by name": lambda root: {"name": str(write_folder(root / "photos", "abc", images=10))},
    "parquet": lambda root: {"data_files": write_parquet(root / "data.parquet", LABELS, THREE, label_column="kind")},
    "integers": lambda root: {"data_files": write_parquet(root / "data.parquet", LABELS)},
    "tar": lambda root: {"name": "webdataset", "data_files": write_tar(root / "data.tar", SAMPLES)},
    "zip": lambda root: {"name": "imagefolder", "data_files": write_zip(root)},
}


@STREAMED
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_every_image_with_its_label_in_one_of_the_parts(kind, streaming, tmp_path):
    has_names, by_folder = kind in ("folder", "folder by name", "parquet"), kind.startswith("folder")
    classes = {} if has_names else {"num_classes": 3}
    data = load(**FORMATS[kind](tmp_path), **classes, streaming=streaming, eval_fraction=0.3)
    trained, evaluated = pixels(data, "train"), pixels(data, "evaluation")
    assert len(trained) + len(evaluated) == 30
    assert trained
    assert evaluated
    wanted = {pixels_of(photo(seed)): seed // 10 if by_folder else seed % 3 for seed in range(30)}
    found = dict(zip(trained + evaluated, labels(data, "train") + labels(data, "evaluation"), strict=True))
    assert found == wanted
    assert data.class_names == (("a", "b", "c") if has_names else ("0", "1", "2"))


def test_what_is_no_data_set_is_refused_with_the_setting_to_look_at(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    missing, empty = str(tmp_path / "missing"), str(tmp_path / "empty")
    for name in (missing, empty):
        assert refused(name).startswith(f"dataset_name: '{name}' cannot be loaded: ")
    for streaming in (False, True):
        for data_dir in (missing, empty, str(tmp_path / "classes")):
            message = refused("imagefolder", data_dir=data_dir, streaming=streaming)
            assert message.startswith(f"data_dir: '{data_dir}' cannot be loaded as 'imagefolder': ")
            assert message.endswith("Give a folder with images in one folder per class.")
        message = refused(data_files=f"{missing}.parquet", streaming=streaming)
        assert message.startswith(f"data_files: '{missing}.parquet' cannot be loaded as 'parquet': ")


@pytest.mark.parametrize("name", ["imagefolder", "parquet", "webdataset"])
def test_a_format_alone_is_refused_whatever_files_lie_where_one_happens_to_be(name, tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert refused(name) == f"dataset_name: '{name}' without data_dir or data_files. Give one of them with it."


@pytest.mark.usefixtures("given_up_files")
@STREAMED
@pytest.mark.parametrize("content", [b"", b"text" * 500])
@pytest.mark.parametrize("name", ["parquet", "webdataset"])
def test_a_file_that_is_not_what_it_should_be_is_refused(name, content, streaming, tmp_path):
    file = tmp_path / ("data.parquet" if name == "parquet" else "data.tar")
    file.write_bytes(content)
    assert refused(name, data_files=str(file), streaming=streaming, num_classes=2).startswith("data_files: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_split": "training"}, "train_split: 'training' is no split of digits. Choose one of train."),
        ({"eval_split": "test"}, "eval_split: 'test' is no split of digits. Choose one of train, or null,"),
        ({"label_column": "image"}, "label_column: 'image' of digits holds Image. Name a column of class labels: "),
        ({"image_column": "label"}, "image_column: 'label' of digits holds ClassLabel. Name a column of images: "),
        ({"data_dir": "x"}, "data_dir: given with the data set 'digits', which has no files. Leave it out, or give a "),
    ],
)
def test_settings_that_do_not_fit_the_data_are_refused(settings, message):
    for streaming in (False, True):
        assert refused("digits", streaming=streaming, **settings).startswith(message)


def test_a_part_too_small_for_every_class_and_a_class_of_one_image_are_refused(tmp_path):
    message = refused("digits", eval_fraction=0.0001)
    assert message.startswith("eval_fraction: 0.0001 of 1797 samples of digits cannot be set aside (")
    assert message.endswith("Give a part in (0, 1) that holds a sample of every class, or an eval_split.")
    message = refused(data_files=write_parquet(tmp_path / "data.parquet", [*[0, 1] * 10, 2], THREE))
    assert message.startswith("eval_fraction: 0.2 of 21 samples of parquet cannot be set aside (")


def columns_of(features, image=None, label=None):
    rows = datasets.Dataset.from_dict({name: [] for name in features}, features=datasets.Features(features))
    return find_image_columns(rows, image, label, "scans")


@pytest.mark.parametrize("name", ["label", "labels", "cls", "class"])
@pytest.mark.parametrize("dtype", ["int64", "uint8", "string", "large_string"])
def test_a_column_that_is_called_a_label_is_one_where_no_column_has_the_type(name, dtype):
    features = {"image": datasets.Image(), "id": datasets.Value("int64"), name: datasets.Value(dtype)}
    assert columns_of(features) == ("image", name)
    assert columns_of({**features, "kind": THREE}) == ("image", "kind")
    assert columns_of({**features, "kind": THREE}, label=name) == ("image", name)


@pytest.mark.parametrize("dtype", ["binary", "large_binary", "string", "large_string"])
def test_a_named_column_of_encoded_images_or_their_paths_is_one_of_images(dtype):
    assert columns_of({"file": datasets.Value(dtype), "label": THREE}, "file") == ("file", "label")


@pytest.mark.usefixtures("given_up_files")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@STREAMED
def test_a_column_of_paths_is_read_from_the_files(streaming, tmp_path):
    write_folder(tmp_path / "photos", ("all",), images=6)
    lines = [f"{tmp_path / 'photos' / 'all' / f'{index}.png'},{index % 2}" for index in range(6)]
    (tmp_path / "list.csv").write_text("\n".join(["file,label", *lines]))
    settings = {"data_files": str(tmp_path / "list.csv"), "eval_fraction": 0.5, "num_classes": 2}
    data = load("csv", image_column="file", streaming=streaming, **settings)
    assert len(pixels(data, "train") + pixels(data, "evaluation")) == 6
    same = {"image_column": "label", "label_column": "label", "data_files": str(tmp_path / "list.csv")}
    assert "label" in refused("csv", **same)


@pytest.mark.parametrize(
    ("feature", "values", "names"),
    [
        (THREE, LABELS, "abc"),
        (None, LABELS, "012"),
        (datasets.Value("uint8"), LABELS, "012"),
        (TEXT, list("bca" * 10), "abc"),
    ],
)
def test_every_label_becomes_the_integer_of_its_class(feature, values, names, tmp_path):
    data = load(data_files=write_parquet(tmp_path / "data.parquet", values, feature))
    assert data.class_names == tuple(names)
    assert data.train.features["label"] == datasets.ClassLabel(names=list(names))
    assert data.train[0]["image"].keys() == {"bytes", "path"}, "images stay as they are stored"
    numbers = labels(data, "train") + labels(data, "evaluation")
    found = dict(zip(pixels(data, "train") + pixels(data, "evaluation"), numbers, strict=True))
    assert Counter(numbers) == {0: 10, 1: 10, 2: 10}
    for seed, value in enumerate(values):
        assert found[pixels_of(photo(seed))] == (names.index(value) if feature is TEXT else value)


@pytest.mark.parametrize(
    ("values", "settings", "told"),
    [
        ([1, 2, 4] * 10, {}, "parquet has no image of classes '0', '3': the model cannot learn it."),
        (LABELS, {"num_classes": 4}, "parquet has no image of class '3': the model cannot learn it."),
        ([0, 1] * 10, {"num_classes": 1000}, "classes '2', '3', '4', '5', '6' and 993 more"),
    ],
)
def test_classes_without_an_image_are_reported(values, settings, told, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="nio_hf"):
        data = load(data_files=write_parquet(tmp_path / "data.parquet", values), **settings)
    assert data.class_names == tuple(map(str, range(settings.get("num_classes", 5))))
    assert told in caplog.text


UNLABELLED = {
    "-1 of named classes": ([-1, *LABELS], THREE),
    "-1 of integers": ([-1, *LABELS], None),
    "-1 of all": ([-1] * 30, None),
    "none of named classes": ([None, *LABELS], THREE),
    "none of texts": ([None, *list("abc" * 10)], TEXT),
    "none of all": ([None] * 30, THREE),
}


@pytest.mark.parametrize("kind", UNLABELLED)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_samples_without_a_label_are_refused(kind, split, tmp_path):
    values, feature = UNLABELLED[kind]
    labelled = [value for value in values if value not in (None, -1)] or LABELS
    other = "validation" if split == "train" else "train"
    files = {
        split: write_parquet(tmp_path / "unlabelled.parquet", values, feature),
        other: write_parquet(tmp_path / "labelled.parquet", labelled, feature),
    }
    for given in (files, files[split]):
        message = refused(data_files=given)
        assert "label" in message
        assert message.endswith("Choose a split whose samples have labels.")


@pytest.mark.parametrize("feature", [None, datasets.Value("uint8")])
def test_labels_beyond_the_number_of_classes_are_refused(feature, tmp_path):
    message = refused(data_files=write_parquet(tmp_path / "data.parquet", LABELS, feature), num_classes=2)
    assert message.startswith("label of 'train' of parquet: a label that is none of the 2 classes: 2, counted from 0")


def test_numbers_that_count_no_classes_are_refused(tmp_path):
    assert refused(data_files=write_parquet(tmp_path / "data.parquet", [1_000, 40_000_000] * 10)) == (
        "num_classes: 'label' of parquet holds labels up to 40,000,000, and there are 20 images. Number the classes "
        "from 0, or set num_classes."
    )


@pytest.mark.parametrize(
    ("trained", "evaluated", "feature"),
    [
        (LABELS, [0, 1, 2, 3], None),
        ([0, 2] * 10, [0, 1, 2], None),
        ([0, 1] * 10, [0, 1, 2], THREE),
        (["cat", "dog"] * 10, ["cat", "fox"], TEXT),
    ],
)
def test_classes_that_are_evaluated_but_not_trained_are_refused(trained, evaluated, feature, tmp_path):
    files = {
        "train": write_parquet(tmp_path / "train.parquet", trained, feature),
        "validation": write_parquet(tmp_path / "validation.parquet", evaluated, feature),
    }
    message = refused(data_files=files)
    assert "class" in message
    assert "parquet" in message


def test_a_class_of_one_split_only_is_named(tmp_path, caplog):
    write_folder(tmp_path / "one" / "train")
    write_folder(tmp_path / "one" / "validation", ("bird", "cat", "dog"))
    assert refused("imagefolder", data_dir=str(tmp_path / "one")) == (
        "classes of imagefolder: images to evaluate on but none to train on of class 'bird'. "
        "Give two splits of the same classes."
    )
    write_folder(tmp_path / "two" / "train", ("bird", "cat", "dog"))
    write_folder(tmp_path / "two" / "validation")
    load("imagefolder", data_dir=str(tmp_path / "two"))
    assert "No image to evaluate on of class 'bird'." in caplog.text


def test_splits_whose_classes_have_another_order_are_refused(monkeypatch):
    def rows(names):
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(names)))
        return datasets.Dataset.from_dict({"image": [Image.new("L", (2, 2))] * 2, "label": [0, 1]}, features=features)

    splits = datasets.DatasetDict(train=rows("abc"), validation=rows("bac"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: splits)
    assert refused("some/name") == (
        "'validation' of some/name: other classes than those of the training split, or in another order. "
        "Give two splits of the same classes."
    )
