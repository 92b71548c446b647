"""Local folders of images: their splits, and layouts that hide the classes."""

from pathlib import Path

import pytest

from nio_hf.errors import DataError
from nio_hf.recipe.settings import DataSettings
from nio_hf.vision.datasets import load_image_data
from tests.vision.pictures import photo, write_folder

STREAMED = pytest.mark.parametrize("streaming", [False, True])


def loaded(root, streaming=False):
    return load_image_data(DataSettings(dataset_name="imagefolder", data_dir=str(root), streaming=streaming))


def refused(root):
    with pytest.raises(DataError) as raised:
        loaded(root)
    return str(raised.value)


def total(data):
    return sum(len(list(part)) for part in (data.train, data.evaluation))


@STREAMED
def test_links_to_the_folders_of_classes_are_followed(streaming, tmp_path):
    real = write_folder(tmp_path / "real", "abc")
    some = write_folder(tmp_path / "some", "d")
    for name in "abc":
        (some / name).symlink_to(real / name)
    (some / "leads back").symlink_to(some)
    data = loaded(some, streaming)
    assert data.class_names == ("a", "b", "c", "d")
    assert total(data) == 32
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "train").symlink_to(some)
    (splits / "val").symlink_to(real)
    data = loaded(splits, streaming)
    assert data.is_split
    assert (len(list(data.train)), len(list(data.evaluation))) == (32, 24)


@STREAMED
def test_lists_and_empty_folders_beside_those_of_classes_are_named_and_are_no_splits(streaming, tmp_path, caplog):
    root = write_folder(tmp_path / "photos")
    for name in ("train.txt", "test.txt", "classes.txt"):
        (root / name).write_text("cat/0.png\n")
    photo(99).save(root / "cat" / "IMG test 1.png")
    (root / "bird").mkdir()
    data = loaded(root, streaming)
    assert (total(data), data.class_names) == (17, ("cat", "dog"))
    assert f"Empty folders make no class: {root / 'bird'}." in caplog.text
    assert "test.txt, train.txt are not read: splits are folders, or given by data_files." in caplog.text
    assert "classes.txt" not in caplog.text


def test_a_class_may_be_called_like_a_split(tmp_path):
    root = write_folder(tmp_path / "vehicles", ["bus", "car", "train"])
    assert loaded(root).class_names == ("bus", "car", "train")
    both = tmp_path / "both"
    for seed, split in enumerate(("train", "val")):
        write_folder(both / split, ["bus", "test tube", "train"], first_seed=100 * seed)
    data = loaded(both)
    assert data.class_names == ("bus", "test tube", "train")
    assert (len(data.train), len(data.evaluation)) == (24, 24)
    assert all("/train/" in row["image"]["path"] for row in data.train)
    assert all("/val/" in row["image"]["path"] for row in data.evaluation)


@pytest.mark.parametrize("name", ["Train", "TRAINING", "data-train", "train_2012"])
def test_a_split_is_known_by_a_word_of_its_name(name, tmp_path):
    write_folder(tmp_path / "deep" / name)
    write_folder(tmp_path / "deep" / "Val", first_seed=100)
    data = loaded(tmp_path)
    assert data.is_split
    assert (len(data.train), len(data.evaluation)) == (16, 16)


def test_images_outside_of_the_splits_are_reported(tmp_path, caplog):
    for seed, name in enumerate(("train", "val", "unsorted")):
        write_folder(tmp_path / name, first_seed=100 * seed)
    data = loaded(tmp_path)
    assert total(data) == 32
    assert "16 images lie outside of the splits and are not read: in unsorted/cat, unsorted/dog." in caplog.text


def test_names_with_the_characters_of_patterns_are_read_as_they_are(tmp_path):
    root = write_folder(tmp_path / "photos [1]", ["[a]", "b*"])
    assert total(loaded(root)) == 16
    write_folder(tmp_path / "photos 1", ["a"])
    assert loaded(root).class_names == ("[a]", "b*")


def test_a_level_too_many_is_named(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write_folder(tmp_path / split / name, ["images"])
    message = refused(tmp_path)
    assert message.startswith(f"data_dir: the images of every class of '{tmp_path}' lie one level too deep, in a ")
    assert "in a folder 'images': train/cat/images, train/dog/images, val/cat/images" in message
    assert message.endswith("Move them up, out of 'images': the folder that holds them names their class.")


@pytest.mark.usefixtures("given_up_files")
def test_a_single_class_stray_images_and_metadata_without_labels_have_messages_of_their_own(tmp_path):
    single = refused(write_folder(tmp_path / "single", ["cat"]))
    assert single.startswith("data_dir: all 8 images of ")
    assert single.endswith("are of one class, 'cat'. Give two classes or more, each in a folder of its own.")

    (tmp_path / "flat").mkdir()
    for seed in range(5):
        photo(seed).save(tmp_path / "flat" / f"{seed}.png")
    message = refused(tmp_path / "flat")
    assert message.startswith(
        f"data_dir: '{tmp_path / 'flat'}' has 5 images that are in no folder of a class. Put the "
    )

    stray = write_folder(tmp_path / "stray")
    photo(99).save(stray / "x.png")
    message = refused(stray)
    assert message.startswith("data_dir: 1 of 17 images of ")
    assert "are not in the folder of a class as the others are: x.png. Move them into the folder" in message

    described = write_folder(tmp_path / "described")
    (described / "metadata.csv").write_text("file_name,text\ncat/0.png,a cat\n")
    message = refused(described)
    assert message.startswith("label_column: no columns of class labels in imagefolder. Its metadata files replace ")
    assert message.endswith("Their columns are image (Image), text (large_string).")


def test_all_that_hides_the_classes_is_reported_at_once(tmp_path):
    for name in ("cat", "dog"):
        write_folder(tmp_path / "train" / name, ["images"])
    write_folder(tmp_path / "val", ["images"])
    message = refused(tmp_path)
    assert message.startswith("2 problems:")
    assert "8 of 24 images" in message
    assert "val/images/0.png" in message
    assert "one level too deep" in message


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError("not allowed")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert refused(tmp_path) == f"{tmp_path}: cannot be read: not allowed. Allow to read it, or move it out."
