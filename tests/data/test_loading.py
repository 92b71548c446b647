"""Splits, parts and columns of data sets: the choice among them, and messages where none can be chosen."""

import logging

import datasets
import pytest

from nio_hf.data import loading
from nio_hf.errors import DataError, Problem
from nio_hf.recipe.settings import DataSettings

COUNT = 1000
ROWS = datasets.Dataset.from_dict({"note": ["a", "b"]})
STREAMED = pytest.mark.parametrize("streaming", [False, True])


def kind_of(read=loading.read_splits):
    embedded = {"song": lambda: ROWS}
    return loading.DataKind("sounds and notes", "sounds", "shines", ("wave", "tape"), embedded, read, digest)


def settings_of(name="numbers", **changes):
    return DataSettings(dataset_name=name, **changes)


def rows_of(count=COUNT, streaming=False):
    rows = datasets.Dataset.from_dict({"number": list(range(count)), "odd": [n % 2 for n in range(count)]})
    rows = rows.cast_column("odd", datasets.ClassLabel(names=["no", "yes"]))
    return rows.to_iterable_dataset() if streaming else rows


def numbers(rows):
    return [row["number"] for row in rows]


def digest(number, seed):
    """Spread over [0, 2^32) evenly, the largest numbers lowest."""
    assert seed == 1
    return (COUNT - 1 - number) * 2**32 // COUNT


def failing(settings):
    raise RuntimeError("it failed") from OSError("no\nsuch thing.")


def test_an_embedded_data_set_is_not_read_from_anywhere():
    assert loading.load_splits(settings_of("song"), kind_of(failing)) == {"train": ROWS}
    stream = loading.load_splits(settings_of("song", streaming=True), kind_of(failing))["train"]
    assert isinstance(stream, datasets.IterableDataset)
    assert list(stream) == list(ROWS)


def test_all_that_is_said_of_a_source_reaches_datasets(monkeypatch):
    asked = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda **arguments: asked.update(arguments) or {"train": ROWS})
    changes = {"dataset_config_name": "loud", "dataset_revision": "v2", "data_dir": "folder", "data_files": ["a.wav"]}
    assert loading.read_splits(settings_of("user/songs", streaming=True, **changes), sample_by="bar") == {"train": ROWS}
    expected = {"path": "user/songs", "name": "loud", "revision": "v2", "data_dir": "folder", "data_files": ["a.wav"]}
    assert asked == {**expected, "streaming": True, "sample_by": "bar"}


def test_a_failure_names_the_setting_to_look_at_and_its_cause():
    with pytest.raises(DataError) as raised:
        loading.load_splits(settings_of("tape", data_dir="here", data_files=["a"]), kind_of(failing))
    assert str(raised.value) == (
        "data_files: ['a'] cannot be loaded as 'tape': no such thing. "
        "Give files that exist and hold sounds and notes, relative to where you are."
    )


def test_a_kind_reads_its_data_itself_and_its_errors_pass():
    def refuse(settings):
        raise DataError(Problem("a", "b", "C"))

    assert loading.load_splits(settings_of("x"), kind_of(lambda settings: {"test": ROWS})) == {"test": ROWS}
    with pytest.raises(DataError, match=r"^a: b\. C\.$"):
        loading.load_splits(settings_of("x"), kind_of(refuse))
    with pytest.raises(DataError, match=r"^dataset_name: 'x' has no split\. Give a data set with sounds and notes\.$"):
        loading.load_splits(settings_of("x"), kind_of(lambda settings: {}))


@STREAMED
def test_a_split_that_is_missing_empty_or_unreadable_is_refused(streaming):
    def break_off():
        raise OSError("gone\naway.")
        yield

    splits = {
        "train": rows_of(3, streaming),
        "test": rows_of(3, streaming).filter(lambda row: False),
        "broken": datasets.IterableDataset.from_generator(break_off),
    }
    assert loading.choose_split(splits, "train", "some_split", "numbers") is splits["train"]
    for split, message in (
        ("other", "some_split: 'other' is no split of numbers. Choose one of train, test, broken."),
        ("test", "some_split: the split 'test' of numbers is empty. Give a split with samples."),
        ("broken", "some_split: the split 'broken' of numbers cannot be read: gone away. Check its files."),
    ):
        with pytest.raises(DataError) as raised:
            loading.choose_split(splits, split, "some_split", "numbers")
        assert str(raised.value) == message


def divided(splits, **changes):
    def prepare(rows, split):
        return rows.filter(lambda row: row["number"] > 0)

    task = (splits, splits["train"], settings_of(**changes), kind_of(), "number")
    train, evaluation, is_split = loading.divide(*task, prepare=prepare, seed=1, stratify_by=None)
    return numbers(train), numbers(evaluation), is_split


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_the_validation_split_is_evaluated_on_unless_another_is_asked_for(name):
    splits = {"train": rows_of(9), "test": rows_of(5), name: rows_of(7)}
    assert divided(splits) == (list(range(9)), list(range(1, 7)), True)
    assert divided(splits, eval_split="test")[1:] == (list(range(1, 5)), True)
    for options in ({"eval_from_train": True, "eval_split": "test"}, {"train_split": name, "eval_from_train": True}):
        train, evaluation, is_split = divided(splits, **options)
        assert sorted(train + evaluation) == list(range(9))
        assert not is_split
    assert not divided({"train": rows_of(9), "test": rows_of(5)})[2]


@STREAMED
def test_parts_share_no_sample_and_have_their_sizes(streaming, caplog):
    with caplog.at_level(logging.INFO, logger="nio_hf"):
        train, evaluation, _ = divided({"train": rows_of(streaming=streaming)}, eval_fraction=0.25)
    assert len(evaluation) == 250
    assert sorted(train + evaluation) == list(range(COUNT))
    assert not streaming or evaluation == list(range(750, COUNT)), "the digest alone decides"
    assert caplog.messages == ["numbers: 0.25 of the training split is set aside to evaluate on."]


@STREAMED
@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_a_fraction_that_is_none_is_refused(fraction, streaming):
    with pytest.raises(DataError) as raised:
        divided({"train": rows_of(5, streaming=streaming)}, eval_fraction=fraction)
    assert str(raised.value) == f"eval_fraction: {fraction}. Give a part in (0, 1), or an eval_split."


def test_a_limit_chooses_at_random_by_its_seed_or_the_first_samples_of_a_stream():
    few, again, other = (numbers(loading.limit_rows(rows_of(), 50, seed)) for seed in (1, 1, 2))
    assert few == again
    assert set(few) != set(other)
    assert len(set(few)) == 50
    assert few != sorted(few)
    assert numbers(loading.limit_rows(rows_of(streaming=True), 5, seed=1)) == list(range(5))
    for rows in (rows_of(9), rows_of(9, streaming=True)):
        assert loading.limit_rows(rows, None, seed=1) is rows
        assert sorted(numbers(loading.limit_rows(rows, 20, seed=1))) == list(range(9))


NUMBER, WORD = datasets.Value("int64"), datasets.Value("string")
LIST = datasets.List(NUMBER)
NOTES = loading.ColumnKind(
    "note_column",
    "notes",
    is_one=lambda feature: feature == WORD,
    can_be_one=lambda feature: feature == NUMBER,
    usual_names=("note", "notes"),
)


def column_of(column=None, fix=None, **features):
    return loading.find_column(datasets.Features(features), column, "songs", NOTES, fix)


@pytest.mark.parametrize(
    ("features", "arguments", "message"),
    [
        ({"a": WORD, "b": WORD}, {}, "2 columns of notes in songs. Name one of its columns: a (string), b (string)."),
        ({"note": NUMBER, "notes": NUMBER}, {}, "2 columns of notes in songs. Name one of its columns: note (int64), "),
        ({"note": LIST}, {}, "no columns of notes in songs. Name one of its columns: note (List)."),
        ({"a": NUMBER}, {"fix": "Sing"}, "no columns of notes in songs. Sing."),
        ({"a": WORD, "b": WORD}, {"fix": "Sing"}, "2 columns of notes in songs. Name one of its columns: "),
        ({"a": WORD}, {"column": "b"}, "'b' is no column of songs. Name one of a (string)."),
        ({"a": LIST}, {"column": "a"}, "'a' of songs holds List. Name a column of notes: a (List)."),
    ],
)
def test_no_column_or_several_are_refused_with_all_of_them(features, arguments, message):
    with pytest.raises(DataError) as raised:
        column_of(**arguments, **features)
    assert str(raised.value).startswith(f"note_column: {message}")


def test_columns_of_a_stream_are_known_from_its_first_samples():
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"tune": "a", "length": 3}]))
    assert stream.features is None
    features = loading.find_features(stream, kind_of(), "songs")
    assert loading.describe_columns(features) == "tune (string), length (int64)"
    message = r"^dataset_name: songs has no columns\. Give a data set of sounds and notes\.$"
    with pytest.raises(DataError, match=message):
        loading.find_features(datasets.Dataset.from_dict({}), kind_of(), "songs")
