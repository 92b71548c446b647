"""Where data sets come from: what `datasets` is asked for, what is embedded, and what is said of those that fail."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from nio_hf.data.sources import DataKind, Source, load_splits, read_source
from nio_hf.errors import DataError, Problem

ROWS = datasets.Dataset.from_dict({"note": ["a", "b"]})


def kind(read: Any = read_source) -> DataKind:
    return DataKind("sounds", "sounds and notes", "play", "sounds", ("wave", "tape"), {"song": lambda: ROWS}, read)


def refused(source: Source, read: Any = read_source) -> str:
    with pytest.raises(DataError) as raised:
        load_splits(source, kind(read))
    return str(raised.value)


def failing(source: Source) -> Any:
    raise OSError("no\nsuch thing.") from None


def test_an_embedded_data_set_is_not_read_from_anywhere() -> None:
    assert load_splits(Source("song"), kind(failing)) == {"train": ROWS}
    stream = load_splits(Source("song", streaming=True), kind(failing))["train"]
    assert isinstance(stream, datasets.IterableDataset)
    assert list(stream) == list(ROWS)


def test_all_of_a_source_reaches_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda **arguments: asked.update(arguments) or {"train": ROWS})
    source = Source("user/songs", "loud", "v2", "folder", ["a.wav"], streaming=True)
    assert read_source(source, sample_by="bar") == {"train": ROWS}
    assert asked == {
        "path": "user/songs",
        "name": "loud",
        "revision": "v2",
        "data_dir": "folder",
        "data_files": ["a.wav"],
        "streaming": True,
        "sample_by": "bar",
    }


def test_the_kind_reads_its_sources_itself() -> None:
    read = []
    source = Source("user/songs")
    assert load_splits(source, kind(lambda given: read.append(given) or {"test": ROWS})) == {"test": ROWS}
    assert read == [source]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source("wave"), "dataset_name: 'wave' without data_dir or data_files. Give one of them with it."),
        (
            Source("wave", data_dir="here"),
            "data_dir: 'here' cannot be loaded as 'wave': no such thing. Give a folder with sounds.",
        ),
        (
            Source("tape", data_dir="here", data_files=["a"]),
            "data_files: ['a'] cannot be loaded as 'tape': no such thing. "
            "Give files that play, relative to where you are.",
        ),
        (
            Source("user/songs", data_files=["a"]),
            "dataset_name: 'user/songs' cannot be loaded: no such thing. "
            "Give 'song', the name of a data set on the Hub, a local folder, or wave, tape.",
        ),
    ],
)
def test_a_failure_names_the_setting_to_look_at(source: Source, message: str) -> None:
    assert refused(source, failing) == message


def test_the_cause_of_a_failure_is_named_and_not_what_wraps_it() -> None:
    def read(source: Source) -> Any:
        raise RuntimeError("it failed") from ValueError("the reason")

    assert "'x' cannot be loaded: the reason." in refused(Source("x"), read)


def test_an_error_of_ours_passes_as_it_is() -> None:
    def read(source: Source) -> Any:
        raise DataError(Problem("a", "b", "C"))

    assert refused(Source("x"), read) == "a: b. C."


def test_a_data_set_without_splits_is_refused() -> None:
    assert refused(Source("x"), lambda source: {}) == "dataset_name: 'x' has no split. Give a data set with sounds."
