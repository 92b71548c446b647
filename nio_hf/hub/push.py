"""The push of a folder: tried again while that may help, and in the end an error that says how to push it later."""

from __future__ import annotations

import fnmatch
import logging
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd
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
_LEFT_OUT = ("_*", ".*", "checkpoint-*", "*.partial", "training_args.bin", "nio_manifest.json", "wandb", "mlruns")
"""Files and folders that stay here: what is private to a machine, what is pickled (`training_args.bin` holds the token,
if one was given as an argument), and what the Hub has in another form."""


def push_folder(
    directory: Path,
    destination: Destination,
    *,
    message: str,
    path_in_repo: str = "",
    leave_out: Sequence[str] = (),
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
        later: folder that `nio-hf push` would push later, for the message; None for `directory`.
        waits: seconds before each further try.

    Returns:
        What the Hub says about the commit.

    Raises:
        HubError: where it was refused, or failed to the last try; the folder is as it was.
        OutputError: for a file that cannot be read.
    """
    command = push_command(later or str(directory), destination)
    names = files_to_push(directory, leave_out)
    if not names:
        raise OutputError(Problem(str(directory), "no file to push", "Give the folder of a model"))

    def push() -> CommitInfo:
        api, repo_id, token = hub(), destination.repo_id, destination.token
        api.create_repo(repo_id, token=token, private=destination.private, exist_ok=True)
        if destination.revision is not None:
            _make_branch(destination)
        prefix = f"{path_in_repo.rstrip('/')}/" if path_in_repo else ""
        operations = [CommitOperationAdd(f"{prefix}{name}", directory / name) for name in names]
        return api.create_commit(
            repo_id, operations, commit_message=message, token=token, revision=destination.revision
        )

    try:
        return _tried(push, destination.repo_id, waits)
    except KeyboardInterrupt:
        logger.warning("The push was interrupted; %s is whole. Push it later: %s", directory, command)
        raise
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, _OF_THE_HUB):
            raise OutputError(Problem(str(directory), one_line(error), f"Then push it: {command}")) from error
        if isinstance(error, NIOError):
            raise
        raise as_hub_error(error, destination.repo_id, f"{directory} is whole; push it later: {command}") from error


def files_to_push(directory: Path, leave_out: Sequence[str] = ()) -> list[str]:
    """Paths of the files of a folder that are pushed, relative to it.

    Left out are what begins with `_` or a dot, checkpoints, and pickled arguments.
    """
    patterns, found = (*_LEFT_OUT, *leave_out), []
    for path in sorted(directory.rglob("*")):
        parts = path.relative_to(directory).parts
        if path.is_file() and not any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in patterns):
            found.append("/".join(parts))
    return found


def push_command(directory: str, destination: Destination) -> str:
    """The command that pushes a folder."""
    command = f"nio-hf push {shlex.quote(directory)} {destination.repo_id}"
    private = " --private" if destination.private else ""
    return command + private + (f" --revision {destination.revision}" if destination.revision else "")


def _make_branch(destination: Destination) -> None:
    hub().create_branch(destination.repo_id, branch=str(destination.revision), token=destination.token, exist_ok=True)


def _tried(action: Callable[[], T], where: str, waits: Sequence[float]) -> T:
    """Do something again while that may help."""
    for number, wait in enumerate(waits, 1):
        try:
            return action()
        except Exception as error:
            if not is_passing(error):
                raise
            logger.warning(
                "Push to %s, try %d of %d: %s. Trying again in %g s.",
                where,
                number,
                len(waits) + 1,
                one_line(error),
                wait,
            )
            time.sleep(wait)
    return action()
