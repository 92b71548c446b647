"""Where texts come from: which column holds them, and which byte of which file is not UTF-8."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from nio_hf.data.sources import Source
from nio_hf.errors import DataError
from nio_hf.text.sources import find_text_column, name_undecodable_file

CHUNK = 2**20
SNOWMAN = "\N{SNOWMAN}".encode()


def rows_of(**dtypes: str) -> datasets.Dataset:
    features = datasets.Features({name: datasets.Value(dtype) for name, dtype in dtypes.items()})
    return datasets.Dataset.from_dict({name: [] for name in dtypes}, features=features)


@pytest.mark.parametrize("dtype", ["string", "large_string"])
def test_the_column_called_text_or_the_only_one_of_texts_is_chosen(dtype: str) -> None:
    assert find_text_column(rows_of(id="int64", body=dtype), None, "notes") == "body"
    assert find_text_column(rows_of(body=dtype, text=dtype), None, "notes") == "text"
    assert find_text_column(rows_of(body=dtype, text=dtype), "body", "notes") == "body"
    assert find_text_column(rows_of(body=dtype, text="int64"), None, "notes") == "body"


@pytest.mark.parametrize(
    ("content", "offset"),
    [
        (b"\xff", 0),
        (b"fine\xe9 not fine", 4),
        (b"x" * (CHUNK - 1) + SNOWMAN + b"\xff", CHUNK + 2),
        (b"x" * (CHUNK - 2) + SNOWMAN[:2] + b"x", CHUNK - 2),
        (b"x" * 2 * CHUNK + SNOWMAN[:2], 2 * CHUNK),
    ],
)
def test_the_first_byte_that_cannot_be_decoded_is_found_wherever_it_is(
    content: bytes, offset: int, tmp_path: Path
) -> None:
    file = tmp_path / "broken.txt"
    file.write_bytes(content)
    with pytest.raises(UnicodeDecodeError) as of_python:
        content.decode()
    assert of_python.value.start == offset
    with pytest.raises(DataError) as raised, name_undecodable_file(Source("text", data_files=str(file))):
        raise RuntimeError("it failed") from of_python.value
    assert f"{file} is not UTF-8: it cannot be decoded at byte {offset}, counted from 0." in str(raised.value)


def test_the_first_file_of_several_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * (CHUNK - 1) + SNOWMAN)
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with (
        pytest.raises(DataError, match=r"b\.txt is not UTF-8"),
        name_undecodable_file(Source("text", data_dir=str(tmp_path))),
    ):
        b"\xff".decode()


def test_other_errors_pass_as_they_are_whatever_the_files_hold(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with (
        pytest.raises(OSError, match=r"^the network is gone$"),
        name_undecodable_file(Source("text", data_dir=str(tmp_path))),
    ):
        raise OSError("the network is gone")


def test_an_error_of_decoding_passes_where_every_local_file_is_fine(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    with pytest.raises(UnicodeDecodeError), name_undecodable_file(Source("text", data_dir=str(tmp_path))):
        b"\xff".decode()
