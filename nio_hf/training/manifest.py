"""Which checkpoints are whole: a list of their files with sizes and digests, written last."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from nio_hf.errors import OutputError, Problem

logger = logging.getLogger(__name__)

MANIFEST_NAME = "nio_manifest.json"
MANIFEST_FORMAT = 1
UNFINISHED_NAME = "nio_unfinished"
"""In a checkpoint that is being written."""
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")


def begin(directory: Path) -> None:
    """Begin to write a checkpoint, in the place of what there is of that name."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / UNFINISHED_NAME).touch()


def write_manifest(directory: Path) -> None:
    """Seal a checkpoint: from here on it is used, and known to be broken where a file of it is missing or changed.

    Everything is on the disk, not only handed to the system, before the manifest is. That and the digests take about
    two seconds for a GiB.

    Raises:
        OutputError: where it cannot be written.
    """
    try:
        files = {file.relative_to(directory).as_posix(): _entry(file) for file in _files(directory)}
        for folder in (directory.parent, directory, *(path for path in directory.rglob("*") if path.is_dir())):
            sync_directory(folder)
        content = {"format": MANIFEST_FORMAT, "saved": time.time(), "files": files}
        write_atomically(directory / MANIFEST_NAME, json.dumps(content, indent=1) + "\n")
        # Until the manifest is there, this tells a checkpoint that was cut off from one that Trainer wrote.
        (directory / UNFINISHED_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(Problem(str(directory), str(error), "Free space, then start again")) from error


def fault_of(directory: Path) -> str | None:
    """What makes a checkpoint unusable; None for one that is as it was written."""
    manifest = _read(directory)
    if manifest is None:
        return f"{MANIFEST_NAME} is missing or cannot be read: it was not written to its end"
    for name, (size, digest) in manifest[1].items():
        file = directory / name
        try:
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size:,} bytes, not {size:,}"
            if _digest(file) != digest:
                return f"{name} has been changed: its SHA-256 is another one"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return None


def has_manifest(directory: Path) -> bool:
    """Whether a checkpoint was written with a manifest."""
    return (directory / MANIFEST_NAME).is_file()


def candidates(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, the one written last first; before them those without manifest, to be told of."""
    return sorted(_checkpoints(run_dir), key=lambda path: (not has_manifest(path), _saved(path)), reverse=True)


def newest_verified(directories: Iterable[Path], fault: Callable[[Path], str | None] = fault_of) -> Path | None:
    """The first of some checkpoints that is as it was written; of the others it is said why they are not used.

    Args:
        directories: as [`candidates`] gives them.
        fault: says what makes one unusable, in an empty text where another process says so.
    """
    for directory in directories:
        found = fault(directory)
        if found is None:
            return directory
        if found:
            logger.warning("%s is passed over: %s.", directory, found)
    return None


def foreign(run_dir: Path) -> list[Path]:
    """Checkpoints that were written by something that knows no manifest, such as Trainer itself."""
    unsealed = [path for path in candidates(run_dir) if not has_manifest(path) and any(path.iterdir())]
    return [path for path in unsealed if not (path / UNFINISHED_NAME).exists()]


def rotate(run_dir: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Delete the oldest checkpoints, those that are not whole first, until there are `limit`.

    Args:
        run_dir: that holds them.
        limit: of their number; None or less than 1 for no limit.
        keep: never deleted, e.g. the one just written, which is the last one known to be whole.
    """
    if limit is None or limit < 1:
        return
    protected = {path.resolve() for path in keep}
    checkpoints = sorted(_checkpoints(run_dir), key=_saved)
    surplus = max(len(checkpoints) - limit, 0)
    for directory in [path for path in checkpoints if path.resolve() not in protected][:surplus]:
        shutil.rmtree(directory, ignore_errors=True)


def write_atomically(file: Path, text: str) -> None:
    """Write a file so that it holds either what it held or all of the text, whatever happens."""
    temporary = file.with_name(f"{file.name}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(file.parent)


def _checkpoints(run_dir: Path) -> list[Path]:
    found = run_dir.iterdir() if run_dir.is_dir() else ()
    return [path for path in found if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]


def _saved(directory: Path) -> tuple[float, int]:
    """When a checkpoint was written, and its step; what has no manifest comes before all that have one."""
    manifest = _read(directory)
    return (0.0 if manifest is None else manifest[0], int(directory.name.rpartition("-")[2]))


def _read(directory: Path) -> tuple[float, dict[str, tuple[int, str]]] | None:
    try:
        content = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
        if content["format"] != MANIFEST_FORMAT:
            return None
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in content["files"].items()}
        return float(content["saved"]), files
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def _files(directory: Path) -> list[Path]:
    own = (MANIFEST_NAME, UNFINISHED_NAME)
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in own)


def _entry(file: Path) -> tuple[int, str]:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    return file.stat().st_size, _digest(file)


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sync_directory(directory: Path) -> None:
    """Make a rename last; systems that cannot open directories do so by themselves."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
