"""Source of Python's standard library: a data set of texts that every installation has."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import datasets

NAME, LICENCE = "stdlib", "PSF-2.0"
_VERSION = ".".join(map(str, sys.version_info[:3]))
ABOUT = f"Python {_VERSION}, licence {LICENCE}"
"""Description of the data set beside its name."""
_LEFT_OUT = frozenset({"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"})
"""Folders of other packages, and of tests."""
_FEATURES = {"text": datasets.Value("string"), "path": datasets.Value("string")}


def stdlib() -> datasets.Dataset:
    """Source files of Python's standard library, about 12 MB, in the order of their paths.

    Tests and files that are not UTF-8 are left out. Another Python version has other files.

    Returns:
        Data set of the columns `text` and `path`, relative to the library with "/" between its parts. Its `info` has
        the licence and the version of Python. `datasets` caches it.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _LEFT_OUT]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    stamps = sorted((file.relative_to(root).as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    rows = datasets.Dataset.from_generator(
        _documents,
        features=datasets.Features(_FEATURES),
        gen_kwargs={"root": root, "stamps": tuple(stamps), "version": sys.version},
    )
    rows.info.description = f"Source of the standard library of Python {sys.version.split()[0]}"
    rows.info.license = LICENCE
    rows.info.version = datasets.Version(_VERSION)
    return rows


def _documents(root: Path, stamps: tuple[tuple[str, int, int], ...], version: str) -> Iterator[dict[str, str]]:
    """Yield the files of stamps (path, size, time). `datasets` names its cache by the arguments."""
    for path, _, _ in stamps:
        try:
            yield {"text": (root / path).read_text(encoding="utf-8"), "path": path}
        except UnicodeDecodeError:
            continue
