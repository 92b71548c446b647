"""Writing into folders: whole files or none, one training at a time, with errors that name the reason."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from nio_hf.errors import OutputError, Problem, one_line

LOCK_NAME = "_nio_lock"
_CHOOSE = "Free space or choose another output_dir"


@contextlib.contextmanager
def output_errors(target: Path, *, delete: bool = False, trained: bool = True) -> Iterator[None]:
    """Turn errors of a disk that is full or cannot be written into [`OutputError`].

    Args:
        target: File or folder that is written.
        delete: Whether to remove an incomplete target, which frees its space.
        trained: Whether the training may have saved checkpoints already.

    Raises:
        OutputError: A failed write, with the target and the reason.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch reports a failed write as a RuntimeError of its file format.
        is_torch = "inline_container" in str(error) or "PytorchStream" in str(error)
        if isinstance(error, RuntimeError) and not is_torch:
            raise
        if delete:
            shutil.rmtree(target, ignore_errors=True)
        found = error.problems[0].found if isinstance(error, OutputError) else one_line(error)
        fix = f"{_CHOOSE}, then start again: checkpoints saved before are whole" if trained else _CHOOSE
        raise OutputError(Problem(str(target), found, fix)) from error


@contextlib.contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Lock a directory against a second training while the context lasts and this process lives.

    On a file system without locks, nothing is locked.

    Raises:
        OutputError: A directory that another training has locked.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (directory / LOCK_NAME).open("w", encoding="ascii") as file:
        try:
            # Not flock (as in filelock), which workers that outlive this process would go on holding.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, PermissionError | BlockingIOError):
                fix = "Wait for it to end, end it, or choose another output_dir"
                raise OutputError(Problem(str(directory), "another training writes here", fix)) from error
        try:
            yield
        finally:
            Path(file.name).unlink(missing_ok=True)


def ensure_writable(directory: Path, needed: int = 0) -> None:
    """Create a directory and try to write into it.

    Raises:
        OutputError: A directory that cannot be written, or has fewer than `needed` bytes free.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise OutputError(Problem(str(directory), str(error), "Choose an output_dir that you can write to")) from error
    if free < needed:
        found = f"{free / 2**20:,.0f} MiB are free, a run needs at least {needed / 2**20:,.0f} MiB for its checkpoints"
        raise OutputError(Problem(str(directory), found, _CHOOSE))


def write_atomically(file: Path, text: str) -> None:
    """Write a text into a file. If this fails at any moment, the file keeps its former content."""
    temporary = file.with_name(f"{file.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync_file(temporary)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(file.parent)


def sync_file(file: Path) -> None:
    """Write the content of a file to the disk, beyond the buffers of the system."""
    # Windows syncs a file only through a handle that may write.
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())


def sync_directory(directory: Path) -> None:
    """Write a rename in a directory to the disk; systems that cannot open directories do so by themselves."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
