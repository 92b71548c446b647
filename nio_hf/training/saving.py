"""Writing into the output directory: by one training at a time, with errors that say what is wrong."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from nio_hf.errors import OutputError, Problem, one_line

LOCK_NAME = "_nio_lock"
_CHOOSE = "Free space or choose another output_dir"
_START_AGAIN = f"{_CHOOSE}, then start again: checkpoints saved before are whole"


@contextlib.contextmanager
def output_errors(target: Path, *, delete: bool = False, trained: bool = True) -> Iterator[None]:
    """Turn what a full disk, or one that cannot be written, makes of a save into an error of ours.

    Args:
        target: what is written.
        delete: remove what was written of it, which makes room.
        trained: whether there may be checkpoints of the training already.

    Raises:
        OutputError: with the target and the reason.
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
        raise OutputError(Problem(str(target), found, _START_AGAIN if trained else _CHOOSE)) from error


@contextlib.contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Hold a directory against a second training, as long as the context lasts and this process lives.

    Where the file system has no locks, nothing is held.

    Raises:
        OutputError: where another training holds it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with (directory / LOCK_NAME).open("w", encoding="ascii") as file:
        try:
            # Not flock, which processes that load data would go on holding.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, PermissionError | BlockingIOError):
                fix = "Wait for it to end, end it, or choose another output_dir"
                raise OutputError(Problem(str(directory), "another training writes here", fix)) from error
        try:
            yield
        finally:
            Path(file.name).unlink(missing_ok=True)
