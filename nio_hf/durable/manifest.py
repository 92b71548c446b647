"""Manifests of checkpoints: files with sizes and digests, written last, which tell whether a checkpoint is whole.

A checkpoint of Trainer has no manifest. Trainer writes the state of the training last, so a checkpoint whose state can
be read counts as whole.
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
"""File in a checkpoint that is still being written, by Trainer or by callbacks."""
_ANOTHER = f"Give a folder OUTPUT_DIR/{PREFIX_CHECKPOINT_DIR}-N, or auto for the newest that can be used"
_UNFINISHED = 0.0
"""Time that stands for an incomplete checkpoint."""
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")


def begin(directory: Path) -> None:
    """Make the empty folder of a checkpoint, in place of one of the same name."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / UNFINISHED_NAME).touch()


def write_manifest(directory: Path) -> None:
    """Seal a checkpoint: its manifest shows from now on whether a file is missing or has changed.

    All files are on the disk, beyond the buffers of the system, before the manifest is. This and the digests take about
    two seconds for a GiB.

    Raises:
        OutputError: A file that cannot be written.
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
        # Without a manifest, this file tells an incomplete checkpoint from a checkpoint of Trainer.
        (directory / UNFINISHED_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(Problem(str(directory), str(error), "Free space, then start again")) from error


def fault_of(directory: Path, *, may_be_thinned: bool = False) -> str | None:
    """Return the fault of a sealed folder in words; None for a folder that is unchanged.

    Args:
        directory: Folder with a manifest.
        may_be_thinned: Whether files may have been removed on purpose.
    """
    manifest = _read_manifest(directory)
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
    """Whether a checkpoint has a manifest."""
    return (directory / MANIFEST_NAME).is_file()


def checkpoint_fault(directory: Path) -> str | None:
    """Return the fault of a checkpoint, sealed or of Trainer, in words; None if no fault is known."""
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
    """Check a checkpoint that the user has named. The user may have removed files from it on purpose.

    Args:
        directory: Folder of the checkpoint.
        verify: Whether to compare its files with the manifest.

    Raises:
        NoCheckpointError: A folder that does not exist, or lacks the state of the training.
        CheckpointError: Files that have changed.
    """
    if not directory.is_dir():
        raise NoCheckpointError(Problem("resume_from_checkpoint", f"{str(directory)!r} is no folder", _ANOTHER))
    if not (directory / TRAINER_STATE_NAME).is_file():
        raise NoCheckpointError(Problem(str(directory), f"no {TRAINER_STATE_NAME} in it", _ANOTHER))
    # A checkpoint that a callback has moved elsewhere has no manifest.
    fault = fault_of(directory, may_be_thinned=True) if verify and has_manifest(directory) else None
    if fault is not None:
        fix = f"{_ANOTHER}. To use it as it is now, delete its {MANIFEST_NAME}"
        raise CheckpointError(Problem(str(directory), fault, fix))


def candidates(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, the incomplete ones first, then the others from the newest on."""
    found = ((_time_and_step(path), path) for path in _list_checkpoints(run_dir))
    return [path for _, path in sorted(found, key=lambda one: (one[0][0] == _UNFINISHED, one[0]), reverse=True)]


def newest_usable(directories: Iterable[Path], fault: Callable[[Path], str | None] = checkpoint_fault) -> Path | None:
    """Return the first usable checkpoint, and log the faults of those before it; None if none is usable.

    Args:
        directories: Checkpoints, as [`candidates`] returns them.
        fault: Function that returns the fault of a checkpoint, or an empty text if another process logs the fault.
    """
    for directory in directories:
        found = fault(directory)
        if found is None:
            return directory
        if found:
            logger.warning("%s is passed over: %s.", directory, found)
    return None


def rotate(run_dir: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Delete the oldest checkpoints, incomplete ones first, until `limit` are left.

    Args:
        run_dir: Folder of the checkpoints.
        limit: Number of checkpoints that may stay; None or less than 1 for no limit.
        keep: Checkpoints that are never deleted, e.g. the newest, which may be the only one known to be whole.
    """
    if limit is None or limit < 1:
        return
    protected = {path.resolve() for path in keep}
    checkpoints = sorted(_list_checkpoints(run_dir), key=_time_and_step)
    surplus = max(len(checkpoints) - limit, 0)
    for directory in [path for path in checkpoints if path.resolve() not in protected][:surplus]:
        shutil.rmtree(directory, ignore_errors=True)


def _list_checkpoints(run_dir: Path) -> list[Path]:
    found = run_dir.iterdir() if run_dir.is_dir() else ()
    return [path for path in found if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]


def _time_and_step(directory: Path) -> tuple[float, int]:
    """Return the time at which a checkpoint was written, and its step; incomplete ones sort before all others."""
    manifest, state = _read_manifest(directory), directory / TRAINER_STATE_NAME
    step = int(directory.name.rpartition("-")[2])
    if manifest is not None:
        return manifest[0], step
    is_finished = state.is_file() and not (directory / UNFINISHED_NAME).exists()
    return (state.stat().st_mtime if is_finished else _UNFINISHED), step


def _read_manifest(directory: Path) -> tuple[float, dict[str, tuple[int, str]]] | None:
    """Return the time of a manifest and its {file: (bytes, SHA-256)}; None if it cannot be read."""
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
