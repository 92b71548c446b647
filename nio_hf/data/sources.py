"""Where samples come from: the Hub, local files, or a data set that is embedded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import datasets

from nio_hf.errors import DataError, Problem, one_line

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset
"""Samples of a split: all of them at hand, or a stream."""


@dataclasses.dataclass(frozen=True)
class Source:
    """What a data set is loaded from.

    Attributes:
        name: of an embedded data set, or what [`datasets.load_dataset`] takes.
        config_name: configuration of the data set.
        revision: on the Hub.
        data_dir: folder in the data set, or of the files.
        data_files: a pattern, a list of them, or a mapping from splits.
        streaming: do not download or convert anything beforehand.
    """

    name: str
    config_name: str | None = None
    revision: str | None = None
    data_dir: str | None = None
    data_files: Any = None
    streaming: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of [`datasets.load_dataset_builder`]."""
        return {
            "path": self.name,
            "name": self.config_name,
            "revision": self.revision,
            "data_dir": self.data_dir,
            "data_files": self.data_files,
        }


def read_source(source: Source, **options: Any) -> Mapping[str, Rows]:
    """The splits that [`datasets.load_dataset`] finds, by name. Its errors pass.

    Args:
        source: to read.
        options: of its format.
    """
    splits: Mapping[str, Rows] = datasets.load_dataset(**source.arguments, streaming=source.streaming, **options)
    return splits


@dataclasses.dataclass(frozen=True)
class DataKind:
    """What samples are, and the words that messages have for them.

    Attributes:
        contents: what a data set of them is "with", e.g. "images".
        columns: what its columns hold, e.g. "images and labels".
        files: what their files do, e.g. "exist".
        folder: what a folder of them is "with", e.g. "images in one folder per class".
        formats: names for `datasets.load_dataset` that need `data_dir` or `data_files`.
        embedded: {name: function that makes the data set}, of data sets that need no download.
        read: function that reads any other source. It may raise errors of any type.
    """

    contents: str
    columns: str
    files: str
    folder: str
    formats: tuple[str, ...]
    embedded: Mapping[str, Callable[[], datasets.Dataset]]
    read: Callable[[Source], Mapping[str, Rows]] = read_source


def load_splits(source: Source, kind: DataKind) -> Mapping[str, Rows]:
    """The splits of a data set, by name.

    Args:
        source: what it is loaded from.
        kind: of its samples.

    Raises:
        DataError: for a data set that cannot be loaded.
    """
    if source.name in kind.embedded:
        rows = kind.embedded[source.name]()
        return {"train": rows.to_iterable_dataset() if source.streaming else rows}
    if source.name in kind.formats and source.data_dir is None and source.data_files is None:
        found = f"{source.name!r} without data_dir or data_files"
        raise DataError(Problem("dataset_name", found, "Give one of them with it"))
    try:
        splits = kind.read(source)
    except DataError:
        raise
    except Exception as error:  # `datasets` hands on what readers of files and networks raise
        raise DataError(_load_problem(source, kind, error)) from error
    if not splits:
        fix = f"Give a data set with {kind.contents}"
        raise DataError(Problem("dataset_name", f"{source.name!r} has no split", fix))
    return splits


def _load_problem(source: Source, kind: DataKind, error: Exception) -> Problem:
    """The problem of a data set that cannot be loaded, with the setting to look at."""
    cause = one_line(error.__cause__ or error)
    if source.name not in kind.formats:
        names = ", ".join(repr(name) for name in kind.embedded)
        fix = f"Give {names}, the name of a data set on the Hub, a local folder, or {', '.join(kind.formats)}"
        return Problem("dataset_name", f"{source.name!r} cannot be loaded: {cause}", fix)
    if source.data_files is not None:
        fix = f"Give files that {kind.files}, relative to where you are"
        return Problem("data_files", f"{source.data_files!r} cannot be loaded as {source.name!r}: {cause}", fix)
    fix = f"Give a folder with {kind.folder}"
    return Problem("data_dir", f"{source.data_dir!r} cannot be loaded as {source.name!r}: {cause}", fix)
