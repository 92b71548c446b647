"""Where to push, and whether that is going to be possible, found out before anything is computed."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

import nio_hf
from nio_hf.errors import HubError, Problem, one_line
from nio_hf.hub.failures import LATER, as_hub_error, is_passing

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Destination:
    """A model repository to push to.

    Attributes:
        repo_id: USER/NAME, or NAME in the namespace of the user.
        token: None for the one that is logged in.
        private: whether a repository that is made is private; None for the default of the namespace.
        revision: branch to push to, made where it does not exist; None for main.
    """

    repo_id: str
    token: str | None = dataclasses.field(default=None, repr=False)
    private: bool | None = None
    revision: str | None = None


@functools.cache
def hub() -> HfApi:
    """The client, which tells the Hub who is asking."""
    return HfApi(library_name="nio_hf", library_version=nio_hf.__version__)


def check_destination(destination: Destination, fix: str = LATER) -> Destination:
    """Find out whether a push will be possible: name, token, permission. Nothing is changed on the Hub.

    Args:
        destination: to check.
        fix: what to do where it is not, beside what is wrong.

    Returns:
        The destination with its whole name. What cannot be found out now, for a Hub that cannot be reached, is left
        to the push, with a warning.

    Raises:
        HubError: for a name that is not valid, a token that is missing, wrong or may not write, another user's
            namespace, offline mode, or a repository that is public though a private one is asked for.
    """
    _check_name(destination.repo_id)
    try:
        user = hub().whoami(token=destination.token, cache=True)
        destination = _with_namespace(destination, user)
        _check_permission(destination, user)
        _check_existing(destination)
    except Exception as error:
        if not is_passing(error):
            raise as_hub_error(error, destination.repo_id, fix) from error
        logger.warning("The Hub does not answer (%s): %s is not checked.", one_line(error), destination.repo_id)
    return destination


def is_repo_id(name: str) -> bool:
    """Whether a repository may have this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        fix = "Give USER/NAME, of letters, digits, and - _ . within a name, 96 characters at most"
        raise HubError(Problem(f"the repository {repo_id!r}", one_line(error), fix)) from error


def _with_namespace(destination: Destination, user: dict[str, Any]) -> Destination:
    if "/" in destination.repo_id:
        return destination
    return dataclasses.replace(destination, repo_id=f"{user['name']}/{destination.repo_id}")


def _check_permission(destination: Destination, user: dict[str, Any]) -> None:
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        fix = "Make one with write permission at https://huggingface.co/settings/tokens, then `hf auth login --force`"
        raise HubError(Problem(destination.repo_id, f"the token of {user['name']} may only read", fix))
    namespace = destination.repo_id.partition("/")[0]
    roles = {org["name"]: org.get("roleInOrg") for org in user.get("orgs") or []} | {user["name"]: "admin"}
    if namespace not in roles or roles[namespace] == "read":
        may = ", ".join(name for name, own in sorted(roles.items()) if own != "read")
        found = f"{user['name']} may not write into the namespace {namespace!r}"
        raise HubError(Problem(destination.repo_id, found, f"Choose one of: {may}"))


def _check_existing(destination: Destination) -> None:
    """Refuse an existing repository that cannot be written, or whose weights everybody could see against the wish."""
    try:
        info = hub().model_info(destination.repo_id, token=destination.token)
        hub().auth_check(destination.repo_id, token=destination.token, write=True)
    except RepositoryNotFoundError:
        return
    except HfHubHTTPError as error:
        # Not every Hub knows the question.
        if is_passing(error) or error.response.status_code != 404:
            raise
    if destination.private and not info.private:
        fix = "Choose another name, make that repository private on the Hub, or leave out --private"
        raise HubError(Problem(destination.repo_id, "exists and is public", fix))
