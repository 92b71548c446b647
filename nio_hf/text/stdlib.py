"""Source of Python's standard library: a data set of texts that every installation has."""

from __future__ import annotations

import hashlib
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
    paths = sorted(file.relative_to(root).as_posix() for file in files)
    # The name of the cache changes with an update of Python.
    digest = hashlib.sha256(sys.version.encode())
    for path in paths:
        status = (root / path).stat()
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    rows = datasets.Dataset.from_generator(
        _documents,
        features=datasets.Features(_FEATURES),
        gen_kwargs={"root": root, "paths": tuple(paths)},
        fingerprint=digest.hexdigest()[:16],
    )
    rows.info.description = f"Source of the standard library of Python {sys.version.split()[0]}"
    rows.info.license = LICENCE
    rows.info.version = datasets.Version(_VERSION)
    return rows


def _documents(root: Path, paths: tuple[str, ...]) -> Iterator[dict[str, str]]:
    for path in paths:
        try:
            yield {"text": (root / path).read_text(encoding="utf-8"), "path": path}
        except UnicodeDecodeError:
            continue
