"""Data set of Python's standard library: its files, their order, and its description."""

import os
import sys
import sysconfig
from pathlib import Path

import pytest

from nio_hf.text.stdlib import stdlib


def test_it_holds_the_source_of_the_library_in_the_order_of_paths():
    rows = stdlib()
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = rows["path"][:]
    assert paths == sorted(set(paths))
    assert (paths[0], paths[-1]) == ("__future__.py", "zoneinfo/_zoneinfo.py")
    assert {"json/decoder.py", "argparse.py"} <= set(paths)
    for row in (rows[0], rows[len(rows) // 2], rows[-1]):
        assert row["text"] == (root / row["path"]).read_text(encoding="utf-8")
    size = sum(len(text.encode()) for text in rows["text"])
    assert 8e6 < size < 20e6


def test_it_says_its_licence_and_version():
    info, version = stdlib().info, sys.version_info
    assert (info.license, str(info.version)) == ("PSF-2.0", f"{version.major}.{version.minor}.{version.micro}")
    assert info.description == f"Source of the standard library of Python {sys.version.split()[0]}"


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library that the test fills."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def write(file, content=b"x = 1\n"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def test_files_that_are_not_utf_8_no_source_or_tests_are_left_out(library):
    for name in ("b.py", "a/c.py", "a.py", "a/d/e.py", "testing.py"):
        write(library / name)
    write(library / "latin.py", "name = 'é'".encode("latin-1"))
    write(library / "german.py", "name = 'ü'".encode())
    for folder in ("test", "a/tests", "idlelib/idle_test", "site-packages", "dist-packages", "__pycache__"):
        write(library / folder / "x.py")
    write(library / "notes.txt")
    rows = stdlib()
    assert rows["path"][:] == ["a.py", "a/c.py", "a/d/e.py", "b.py", "german.py", "testing.py"]
    assert rows[4]["text"] == "name = 'ü'"


def test_it_is_read_once_and_an_update_is_seen(library, monkeypatch):
    write(library / "a.py")
    first = stdlib()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", None)
        second = stdlib()
    assert second.to_dict() == first.to_dict()
    mapped = [rows.map(lambda row: {"length": len(row["text"])}).cache_files for rows in (first, second)]
    assert mapped[0] == mapped[1], "what was made of it is found again"
    write(library / "a.py", b"x = 2\n")
    os.utime(library / "a.py", (1, 1))
    assert stdlib()["text"][:] == ["x = 2\n"]
    monkeypatch.setattr(sys, "version", "3.99.0 (another)")
    assert stdlib().info.description.endswith("Python 3.99.0")
