"""Which column is chosen, and what is said where none can be."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from nio_hf.data.columns import ColumnKind, describe_columns, find_column, find_features
from nio_hf.data.sources import DataKind
from nio_hf.errors import DataError

KIND = DataKind("sounds", "sounds and notes", "exist", "sound files", (), {})
NUMBER, WORD = datasets.Value("int64"), datasets.Value("string")
LIST = datasets.List(NUMBER)
COLUMN = ColumnKind(
    "note_column",
    "notes",
    is_one=lambda feature: feature == WORD,
    can_be_one=lambda feature: feature == NUMBER,
    usual_names=("note", "notes"),
)


def found(column: str | None = None, fix: str | None = None, **features: Any) -> str:
    return find_column(datasets.Features(features), column, "songs", COLUMN, fix)


def test_the_only_column_of_the_type_is_chosen_before_one_that_is_called_so() -> None:
    assert found(tune=WORD, note=NUMBER) == "tune"
    assert found(pitch=NUMBER, notes=NUMBER) == "notes"
    assert found("pitch", tune=WORD, pitch=NUMBER) == "pitch"


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
def test_no_column_or_several_are_refused_with_all_of_them(
    features: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as raised:
        found(**arguments, **features)
    assert str(raised.value).startswith(f"note_column: {message}")


def test_columns_of_a_stream_are_known_from_its_first_samples() -> None:
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"tune": "a", "length": 3}]))
    assert stream.features is None
    assert describe_columns(find_features(stream, KIND, "songs")) == "tune (string), length (int64)"


def test_a_data_set_without_columns_is_refused() -> None:
    with pytest.raises(DataError) as raised:
        find_features(datasets.Dataset.from_dict({}), KIND, "songs")
    assert str(raised.value) == "dataset_name: songs has no columns. Give a data set of sounds and notes."
