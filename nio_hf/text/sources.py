"""Where texts come from: the Hub, local files, or Python's standard library."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import datasets
from datasets.utils.extract import Extractor

from nio_hf.data.columns import TEXT_TYPES, ColumnKind, find_column, find_features
from nio_hf.data.sources import DataKind, Rows, Source, read_source
from nio_hf.errors import DataError, Problem
from nio_hf.text.stdlib import NAME, stdlib

_TEXT = "text"
"""The format of plain text in `datasets`, and the usual name of a column of texts."""
_FORMATS = (_TEXT, "json", "csv", "parquet")
_CHUNK = 2**20


def _read_texts(source: Source) -> Mapping[str, Rows]:
    """The splits of a data set. A file of plain text is one document."""
    is_plain = source.name == _TEXT or (
        source.name not in _FORMATS and datasets.load_dataset_builder(**source.arguments).name == _TEXT
    )
    return read_source(source, **({"sample_by": "document"} if is_plain else {}))


TEXTS = DataKind(
    contents="texts",
    columns="texts",
    files="exist and hold texts",
    folder="text files",
    formats=_FORMATS,
    embedded={NAME: stdlib},
    read=_read_texts,
)
"""Documents of text."""


def find_text_column(rows: Rows, column: str | None, name: str) -> str:
    """The column of texts: the one that is named, the one called "text", or the only one of that type.

    Raises:
        DataError: where there is none, or more than one to choose from.
    """
    features = find_features(rows, TEXTS, name)
    if column is None and _holds_texts(features.get(_TEXT)):
        return _TEXT
    return find_column(features, column, name, ColumnKind("text_column", "texts", _holds_texts, _holds_texts))


def _holds_texts(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in TEXT_TYPES


@contextlib.contextmanager
def name_undecodable_file(source: Source) -> Iterator[None]:
    """Let errors that bytes outside of UTF-8 cause name the local file and the place.

    Raises:
        DataError: in the place of such an error. Other errors pass.
    """
    try:
        yield
    except Exception as error:
        problem = _undecodable_problem(source) if _is_of_decoding(error) else None
        if problem is None:
            raise
        raise DataError(problem) from error


def _is_of_decoding(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, is a failure to decode."""
    while error is not None:
        if isinstance(error, UnicodeDecodeError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _undecodable_problem(source: Source) -> Problem | None:
    """The first local file that is not UTF-8; None where all of them are, or none of them is local."""
    files = datasets.load_dataset_builder(**source.arguments).config.data_files or {}
    keys = {"data_files": source.data_files, "data_dir": source.data_dir, "dataset_name": source.name}
    where = next(key for key, value in keys.items() if value is not None)
    for file in (Path(name) for names in files.values() for name in names):
        offset = _undecodable_byte(file) if file.is_file() and Extractor.infer_extractor_format(file) is None else None
        if offset is not None:
            found = f"{file} is not UTF-8: it cannot be decoded at byte {offset}, counted from 0"
            return Problem(where, found, "Convert the file to UTF-8, or leave it out")
    return None


def _undecodable_byte(file: Path) -> int | None:
    """The offset of the first byte of a file that cannot be decoded; None where it is UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = 0
    with file.open("rb") as opened:
        while True:
            chunk = opened.read(_CHUNK)
            pending, _ = decoder.getstate()
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return start - len(pending) + error.start
            if not chunk:
                return None
            start += len(chunk)
