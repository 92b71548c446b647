"""Pushes to the Hub: checks beforehand, retries, and errors that say how to go on."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import functools
import json
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, errors
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

import nio_hf
from nio_hf.errors import HubError, NIOError, OutputError, Problem, one_line
from nio_hf.hub.run_folder import shareable_files

logger = logging.getLogger(__name__)

T = TypeVar("T")

CARD_NAME = "README.md"
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds to wait before each further attempt."""
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token with write permission"
_LATER = "To push later, leave out push_to_hub now, and call `nio-hf push` then"
_PASSING = {408, 409, 412, 425, 429, 500, 502, 503, 504}
"""Statuses after which the same request may succeed; 409 and 412 mean a push of another process."""
_LEFT_OUT = (
    *("_*", ".*", "checkpoint-*", "*.partial", "training_args.bin", "nio_manifest.json", "nio_unfinished"),
    *("runs", "wandb", "mlruns", "report.html"),
)
"""Files and folders that are never pushed: pickles (`training_args.bin` may hold the token), and files that name the
machine and its folders, such as the logs of trackers and the report."""
_ONLY_TO_RESUME = ("*.bin", "*.pt", "*.pth", "global_step*", "latest", "zero_to_fp32.py")
"""Files of a checkpoint that are not part of the model."""
_OF_A_RUN = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "trainer_state.json",
    "all_results.json",
    "nio_*.json",
    "nio_*.yaml",
    "nio_sample.txt",
    "plots/nio_*.png",
    "plots/training.png",
    "plots/inspection.png",
    "inspect/*",
    "ema/*",
)
"""Files in a repository that belong to a run: a push deletes those of an earlier run."""


@dataclasses.dataclass(frozen=True)
class Destination:
    """A model repository to push to.

    Attributes:
        repo_id: USER/NAME, or NAME in the namespace of the user.
        token: Token of the user; None for the token of the login.
        private: Whether a new repository is private; None for the default of the namespace.
        revision: Branch to push to, which is created if it does not exist; None for main.
    """

    repo_id: str
    token: str | None = dataclasses.field(default=None, repr=False)
    private: bool | None = None
    revision: str | None = None


@functools.cache
def hub() -> HfApi:
    """Return the client of the Hub."""
    return HfApi(library_name="nio_hf", library_version=nio_hf.__version__)


def is_repo_id(name: str) -> bool:
    """Whether the name is valid for a repository."""
    with contextlib.suppress(errors.HFValidationError):
        validate_repo_id(name)
        return True
    return False


def check_destination(destination: Destination, fix: str = _LATER) -> Destination:
    """Check that a push will be possible, and complete the name of the repository. Nothing is changed on the Hub.

    If the Hub cannot be reached now, a warning says so, and the push will find out.

    Args:
        destination: Repository to push to.
        fix: Last sentence of the error.

    Raises:
        HubError: An invalid name, a token that is missing, wrong or may only read, the namespace of another user,
            offline mode, or a public repository where a private one is asked for.
    """
    where = destination.repo_id
    try:
        validate_repo_id(where)
    except errors.HFValidationError as error:
        rule = "Give USER/NAME, of letters, digits, and - _ . within a name, 96 characters at most"
        raise HubError(Problem(f"the repository {where!r}", one_line(error), rule)) from error
    try:
        user = hub().whoami(token=destination.token, cache=True)
        where = where if "/" in where else f"{user['name']}/{where}"
        destination = dataclasses.replace(destination, repo_id=where)
        _check_permission(destination, user)
    except Exception as error:
        if not is_passing(error):
            raise as_hub_error(error, where, fix) from error
        logger.warning("The Hub does not answer (%s): %s is not checked.", one_line(error), where)
    return destination


def _check_permission(destination: Destination, user: dict[str, Any]) -> None:
    where, token = destination.repo_id, destination.token
    if ((user.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        fix = "Make one with write permission at https://huggingface.co/settings/tokens, then `hf auth login --force`"
        raise HubError(Problem(where, f"the token of {user['name']} may only read", fix))
    roles = {org["name"]: org.get("roleInOrg") for org in user.get("orgs") or []} | {user["name"]: "admin"}
    namespace, writable = where.partition("/")[0], sorted(name for name, role in roles.items() if role != "read")
    if namespace not in writable:
        found = f"{user['name']} may not write into the namespace {namespace!r}"
        raise HubError(Problem(where, found, f"Choose one of: {', '.join(writable)}"))
    try:
        is_public = not hub().model_info(where, token=token).private
        hub().auth_check(where, token=token, write=True)
    except errors.RepositoryNotFoundError:
        return
    except errors.HfHubHTTPError as error:
        # Some Hubs do not have this request.
        if is_passing(error) or error.response.status_code != 404:
            raise
    if destination.private and is_public:
        fix = "Choose another name, make that repository private on the Hub, or leave out --private"
        raise HubError(Problem(where, "exists and is public", fix))


def card_on_hub(destination: Destination) -> ModelCard | None:
    """Load the card of a repository, from main if the branch does not exist yet; None if there is no card."""
    for revision in (destination.revision, None):
        try:
            path = hub().hf_hub_download(destination.repo_id, CARD_NAME, token=destination.token, revision=revision)
            card: ModelCard = ModelCard.load(path, ignore_metadata_errors=True)
            return card
        except errors.RevisionNotFoundError:
            continue
        except errors.LocalEntryNotFoundError:
            raise
        except (errors.EntryNotFoundError, errors.RepositoryNotFoundError):
            break
    return None


def push_folder(
    directory: Path,
    destination: Destination,
    message: str,
    *,
    path_in_repo: str = "",
    with_card: bool = True,
    later: str | None = None,
    waits: Sequence[float] = WAITS,
) -> CommitInfo:
    """Push a model, or a checkpoint into the folder `path_in_repo`, in one commit.

    The repository is created if it does not exist. A push is never partial: the commit is made when all files have
    arrived (`HfApi.upload_folder` may make several). Files that the Hub has already are not sent again, so each further
    attempt goes on where the last one stopped.

    Args:
        directory: Folder to push.
        destination: Repository to push to.
        message: Message of the commit.
        path_in_repo: Folder in the repository for a checkpoint; empty for a model.
        with_card: Whether the model card is pushed, too.
        later: Command in the error, which pushes the folder later; None for `nio-hf push` to the same destination.
        waits: Seconds to wait before each further attempt.

    Raises:
        HubError: A push that was refused, or whose attempts all failed. The folder is unchanged.
        OutputError: A file that cannot be read.
    """
    left_out = (*_LEFT_OUT, *([] if path_in_repo else _ONLY_TO_RESUME), *([] if with_card else [CARD_NAME]))
    contents: dict[str, Path | bytes] = {}
    for path in sorted(directory.rglob("*")):
        parts = path.relative_to(directory).parts
        if path.is_file() and not any(_fits(part, left_out) for part in parts):
            contents["/".join(parts)] = path
    if not contents:
        raise OutputError(Problem(str(directory), "no file to push", "Give the folder of a model"))
    contents |= shareable_files(directory)
    prefix = f"{path_in_repo}/" if path_in_repo else ""

    def push() -> CommitInfo:
        token, revision = destination.token, destination.revision
        made = hub().create_repo(destination.repo_id, token=token, private=destination.private, exist_ok=True)
        if revision is not None:
            hub().create_branch(made.repo_id, branch=revision, token=token, exist_ok=True)
        present = [] if path_in_repo else hub().list_repo_files(made.repo_id, revision=revision, token=token)
        gone = [path for path in present if path not in contents and _fits(path, _OF_A_RUN)]
        operations: list[Any] = [CommitOperationAdd(prefix + name, content) for name, content in contents.items()]
        operations += [CommitOperationDelete(path) for path in gone]
        return hub().create_commit(made.repo_id, operations, commit_message=message, token=token, revision=revision)

    with push_errors(directory, destination, later or push_command(directory, destination)):
        return retry(push, destination.repo_id, waits)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether a path fits one of some patterns, part by part."""
    parts = name.split("/")
    return any(
        len(parts) == len(own) and all(map(fnmatch.fnmatchcase, parts, own))
        for own in (pattern.split("/") for pattern in patterns)
    )


def push_command(directory: Path, destination: Destination, **options: str | Sequence[str] | None) -> str:
    """Return the command that pushes a folder, with those further options of `nio-hf push` that are not None."""
    words = ["nio-hf", "push", str(directory), destination.repo_id, *(["--private"] if destination.private else [])]
    for name, value in {"revision": destination.revision, **options}.items():
        for single in [value] if isinstance(value, str) else value or ():
            words += [f"--{name}", single]
    return shlex.join(words)


def retry(action: Callable[[], T], where: str, waits: Sequence[float]) -> T:
    """Carry out an action, and repeat it after a warning while another attempt may succeed."""
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


@contextlib.contextmanager
def push_errors(directory: Path, destination: Destination, later: str) -> Iterator[None]:
    """Turn the errors of a push into errors of this package, with the command that pushes the folder later.

    Raises:
        HubError: A request that the Hub refuses, or a Hub that does not answer.
        OutputError: A file that cannot be read.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        logger.warning("The push was interrupted; %s is whole. Push it later: %s", directory, later)
        raise
    except NIOError:
        raise
    except Exception as error:
        # These errors are OSErrors, too, but not about a file.
        of_the_hub = (errors.HfHubHTTPError, errors.LocalTokenNotFoundError, ConnectionError, TimeoutError)
        if isinstance(error, OSError) and not isinstance(error, of_the_hub):
            raise OutputError(Problem(str(directory), one_line(error), f"Then push it: {later}")) from error
        raise as_hub_error(error, destination.repo_id, f"{directory} is whole; push it later: {later}") from error


def is_passing(error: Exception) -> bool:
    """Whether another attempt may succeed later."""
    error = _cause(error)
    if isinstance(error, errors.LocalEntryNotFoundError):
        return True
    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in _PASSING
    # JSONDecodeError: a server error whose text is not the expected JSON.
    passing = (json.JSONDecodeError, errors.HTTPError, ConnectionError, TimeoutError)  # type: ignore[attr-defined]
    return isinstance(error, passing) and not isinstance(error, errors.OfflineModeIsEnabled)


def as_hub_error(error: Exception, where: str, fix: str) -> HubError:
    """Return the error of this package that explains an error of the Hub and says how to go on."""
    if isinstance(error, HubError):
        return error
    error = _cause(error)
    text = getattr(error, "server_message", None) or one_line(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = {403: f"no permission to write there ({text})", 404: f"not found, or not yours to see ({text})"}
    found = text if isinstance(error, errors.LocalEntryNotFoundError) else said.get(status or 0, text)
    if isinstance(error, errors.LocalTokenNotFoundError):
        found, fix = "no token to push with", f"{_LOG_IN}. {fix}"
    elif isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        found, fix = "HF_HUB_OFFLINE is set, so nothing can be pushed", f"Unset it. {fix}"
    elif status == 401:
        found, fix = f"the token is not valid ({text})", f"{_LOG_IN}. {fix}"
    return HubError(Problem(where, found, fix))


def _cause(error: Exception) -> Exception:
    """Return the error that huggingface_hub has wrapped in an error of an upload."""
    while type(error) is RuntimeError and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error
