"""Which checkpoints are whole: a list of their files with sizes and digests, written last.

A checkpoint of Trainer has no such list. Trainer writes the state of the training last, so a checkpoint is taken for
whole where that can be read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from nio_hf.errors import CheckpointError, NoCheckpointError, OutputError, Problem, one_line
from nio_hf.files import sync_directory, sync_file, write_atomically

logger = logging.getLogger(__name__)

MANIFEST_NAME, MANIFEST_FORMAT = "nio_manifest.json", 1
UNFINISHED_NAME = "nio_unfinished"
"""Name of the file that a checkpoint holds while it is written, also by callbacks."""
_ANOTHER = f"Give a folder OUTPUT_DIR/{PREFIX_CHECKPOINT_DIR}-N, or auto for the newest that can be used"
_UNFINISHED = 0.0
"""Time of a checkpoint that was not written to its end."""
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
        OutputError: Where it cannot be written.
    """
    files = {}
    try:
        for path in (directory.parent, directory, *sorted(directory.rglob("*"))):
            if path.is_dir():
                sync_directory(path)
            elif path.is_file() and path.name not in (MANIFEST_NAME, UNFINISHED_NAME):
                sync_file(path)
                files[path.relative_to(directory).as_posix()] = (path.stat().st_size, _digest(path))
        content = {"format": MANIFEST_FORMAT, "saved": time.time(), "files": files}
        write_atomically(directory / MANIFEST_NAME, json.dumps(content, indent=1) + "\n")
        # Until the manifest is there, this tells a checkpoint that was cut off from one that Trainer wrote.
        (directory / UNFINISHED_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(Problem(str(directory), str(error), "Free space, then start again")) from error


def fault_of(directory: Path, *, may_be_thinned: bool = False) -> str | None:
    """What makes a sealed folder unusable; None for one that is as it was written.

    Args:
        directory: Folder that was sealed.
        may_be_thinned: Whether files may have been taken out on purpose.
    """
    manifest = _read(directory)
    if manifest is None:
        return f"{MANIFEST_NAME} is missing or cannot be read: it was not written to its end"
    for name, (size, digest) in manifest[1].items():
        file = directory / name
        try:
            if may_be_thinned and not file.exists():
                continue
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


def checkpoint_fault(directory: Path) -> str | None:
    """What makes a checkpoint unusable, sealed or not; None where nothing is known against it."""
    if has_manifest(directory):
        return fault_of(directory)
    if (directory / UNFINISHED_NAME).exists():
        return f"{MANIFEST_NAME} is missing: it was not written to its end"
    try:
        TrainerState.load_from_json(str(directory / TRAINER_STATE_NAME))
    except (OSError, ValueError, TypeError) as error:
        return f"{TRAINER_STATE_NAME} cannot be read ({one_line(error)})"
    return None


def check_checkpoint(directory: Path, *, verify: bool) -> None:
    """Refuse a folder that was asked for by name and cannot be used. Files may have been taken out of it on purpose.

    Args:
        directory: Folder that was asked for.
        verify: Look at its files, too.

    Raises:
        NoCheckpointError: For a folder that is none, or lacks the state of the training.
        CheckpointError: For files that were changed.
    """
    if not directory.is_dir():
        raise NoCheckpointError(Problem("resume_from_checkpoint", f"{str(directory)!r} is no folder", _ANOTHER))
    if not (directory / TRAINER_STATE_NAME).is_file():
        raise NoCheckpointError(Problem(str(directory), f"no {TRAINER_STATE_NAME} in it", _ANOTHER))
    # A checkpoint that a callback has moved away has never been sealed.
    fault = fault_of(directory, may_be_thinned=True) if verify and has_manifest(directory) else None
    if fault is not None:
        fix = f"{_ANOTHER}. To use it as it is now, delete its {MANIFEST_NAME}"
        raise CheckpointError(Problem(str(directory), fault, fix))


def candidates(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, the one written last first; before them those that were not written to their end."""
    found = ((_saved(path), path) for path in _checkpoints(run_dir))
    return [path for _, path in sorted(found, key=lambda one: (one[0][0] == _UNFINISHED, one[0]), reverse=True)]


def newest_usable(directories: Iterable[Path], fault: Callable[[Path], str | None] = checkpoint_fault) -> Path | None:
    """The first of some checkpoints that can be used; the log says why the others cannot.

    Args:
        directories: Checkpoints as [`candidates`] gives them.
        fault: Says what makes one unusable, with an empty text where another process says so.
    """
    for directory in directories:
        found = fault(directory)
        if found is None:
            return directory
        if found:
            logger.warning("%s is passed over: %s.", directory, found)
    return None


def rotate(run_dir: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Delete the oldest checkpoints, those that are not whole first, until there are `limit`.

    Args:
        run_dir: Folder that holds them.
        limit: Number of checkpoints that may stay; None or less than 1 for no limit.
        keep: Checkpoints that are never deleted, e.g. the one just written, which is the last one known to be whole.
    """
    if limit is None or limit < 1:
        return
    protected = {path.resolve() for path in keep}
    checkpoints = sorted(_checkpoints(run_dir), key=_saved)
    surplus = max(len(checkpoints) - limit, 0)
    for directory in [path for path in checkpoints if path.resolve() not in protected][:surplus]:
        shutil.rmtree(directory, ignore_errors=True)


def _checkpoints(run_dir: Path) -> list[Path]:
    found = run_dir.iterdir() if run_dir.is_dir() else ()
    return [path for path in found if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]


def _saved(directory: Path) -> tuple[float, int]:
    """When a checkpoint was written, and its step; what was not written to its end comes before all others."""
    manifest, state = _read(directory), directory / TRAINER_STATE_NAME
    step = int(directory.name.rpartition("-")[2])
    if manifest is not None:
        return manifest[0], step
    is_finished = state.is_file() and not (directory / UNFINISHED_NAME).exists()
    return (state.stat().st_mtime if is_finished else _UNFINISHED), step


def _read(directory: Path) -> tuple[float, dict[str, tuple[int, str]]] | None:
    """When a folder was sealed, and {file: (bytes, SHA-256)}; None without a manifest that can be read."""
    try:
        content = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
        if content["format"] != MANIFEST_FORMAT:
            return None
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in content["files"].items()}
        return float(content["saved"]), files
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
