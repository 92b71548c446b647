"""The push of a folder: tried again while that may help, and in the end an error that says how to push it later."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from nio_hf.errors import NIOError, OutputError, Problem, one_line
from nio_hf.hub.access import Destination, hub
from nio_hf.hub.failures import as_hub_error, is_passing

logger = logging.getLogger(__name__)

T = TypeVar("T")

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further try of what may pass."""
_OF_THE_HUB = (HfHubHTTPError, LocalTokenNotFoundError, ConnectionError, TimeoutError)
"""Errors that are an OSError, but not about a file."""
_LEFT_OUT = (
    "_*",
    ".*",
    "checkpoint-*",
    "*.partial",
    "training_args.bin",
    "nio_manifest.json",
    "nio_unfinished",
    "runs",
    "wandb",
    "mlruns",
    "report.html",
)
"""Files and folders that stay here: what is pickled (`training_args.bin` holds the token, where one was given as an
argument), and what names the machine and its folders, as the logs of trackers and the report do."""


def push_folder(
    directory: Path,
    destination: Destination,
    *,
    message: str,
    path_in_repo: str = "",
    leave_out: Sequence[str] = (),
    replaced: Mapping[str, bytes] | None = None,
    stale: Sequence[str] = (),
    later: str | None = None,
    waits: Sequence[float] = WAITS,
) -> CommitInfo:
    """Push the files of a folder in one commit, into a repository that is made where it does not exist.

    Nothing arrives by halves: the commit is made when all files are there. Files that the Hub has already are not sent
    again, so another try goes on where the last one stopped.

    Args:
        directory: to push, but for what [`files_to_push`] leaves out.
        destination: where to.
        message: of the commit.
        path_in_repo: folder to push into; the root by default.
        leave_out: patterns of names of files and folders that are not pushed, beside those that never are.
        replaced: {path in the folder: what is pushed in the place of that file}.
        stale: patterns of paths that are deleted in the repository where the folder has no such file.
        later: the command that would push it later; None for `nio-hf push` with the same destination.
        waits: seconds before each further try.

    Returns:
        What the Hub says about the commit.

    Raises:
        HubError: where it was refused, or failed to the last try; the folder is as it was.
        OutputError: for a file that cannot be read.
    """
    contents: dict[str, Path | bytes] = {name: directory / name for name in files_to_push(directory, leave_out)}
    if not contents:
        raise OutputError(Problem(str(directory), "no file to push", "Give the folder of a model"))
    contents |= {name: content for name, content in (replaced or {}).items() if name in contents}
    prefix = f"{path_in_repo.rstrip('/')}/" if path_in_repo else ""

    def push() -> CommitInfo:
        token, revision = destination.token, destination.revision
        made = hub().create_repo(destination.repo_id, token=token, private=destination.private, exist_ok=True)
        if revision is not None:
            hub().create_branch(made.repo_id, branch=revision, token=token, exist_ok=True)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(prefix + name, content) for name, content in contents.items()
        ]
        present = hub().list_repo_files(made.repo_id, revision=revision, token=token) if stale else []
        left_over = [path for path in present if path not in contents and _fits(path, stale)]
        operations += [CommitOperationDelete(path) for path in left_over]
        return hub().create_commit(made.repo_id, operations, commit_message=message, token=token, revision=revision)

    with push_errors(directory, destination, later or push_command(directory, destination)):
        return tried(push, destination.repo_id, waits)


@contextlib.contextmanager
def push_errors(directory: Path, destination: Destination, later: str) -> Iterator[None]:
    """Turn what can go wrong with a push into errors of ours, which say how to push the folder later.

    Raises:
        HubError: for what the Hub refuses, or for one that does not answer.
        OutputError: for a file that cannot be read.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        logger.warning("The push was interrupted; %s is whole. Push it later: %s", directory, later)
        raise
    except Exception as error:
        if isinstance(error, NIOError):
            raise
        if isinstance(error, OSError) and not isinstance(error, _OF_THE_HUB):
            raise OutputError(Problem(str(directory), one_line(error), f"Then push it: {later}")) from error
        raise as_hub_error(error, destination.repo_id, f"{directory} is whole; push it later: {later}") from error


def files_to_push(directory: Path, leave_out: Sequence[str] = ()) -> list[str]:
    """Paths of the files of a folder that are pushed, relative to it.

    Left out are what begins with `_` or a dot, checkpoints, logs of trackers, and pickled arguments.
    """
    patterns, found = (*_LEFT_OUT, *leave_out), []
    for path in sorted(directory.rglob("*")):
        parts = path.relative_to(directory).parts
        if path.is_file() and not any(_fits(part, patterns) for part in parts):
            found.append("/".join(parts))
    return found


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def push_command(directory: Path, destination: Destination, **options: str | Sequence[str] | None) -> str:
    """The command that pushes a folder.

    Args:
        directory: to push.
        destination: where to.
        **options: further ones of `nio-hf push`, those that are not None; one with several values is repeated.
    """
    words = ["nio-hf", "push", str(directory), destination.repo_id, *(["--private"] if destination.private else [])]
    for name, value in {"revision": destination.revision, **options}.items():
        for single in [value] if isinstance(value, str) else value or ():
            words += [f"--{name}", single]
    return shlex.join(words)


def tried(action: Callable[[], T], where: str, waits: Sequence[float]) -> T:
    """Do something again while that may help.

    Args:
        action: to do.
        where: what it is about, for the log.
        waits: seconds before each further try.
    """
    for number, wait in enumerate(waits, 1):
        try:
            return action()
        except Exception as error:
            if not is_passing(error):
                raise
            tries = f"{number} of {len(waits) + 1}"
            logger.warning("Push to %s, try %s: %s. Trying again in %g s.", where, tries, one_line(error), wait)
            time.sleep(wait)
    return action()
