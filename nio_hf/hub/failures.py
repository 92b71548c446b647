"""What failures of the Hub mean: which pass by themselves, and what to do about the others."""

from __future__ import annotations

import json

from huggingface_hub import constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

from nio_hf.errors import HubError, Problem, one_line

LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token with write permission"
LATER = "To push later, leave out push_to_hub now, and call `nio-hf push` then"
_PASSING = {408, 409, 412, 425, 429, 500, 502, 503, 504}
"""Statuses after which the same request may succeed; 409 and 412 where somebody else pushes at the same time."""


def is_passing(error: Exception) -> bool:
    """Whether it may help to try again later."""
    error = _cause(error)
    if isinstance(error, LocalEntryNotFoundError):
        return True
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _PASSING
    # A server error whose text is not the JSON that was expected.
    return isinstance(error, json.JSONDecodeError | TransportError | ConnectionError | TimeoutError) and not isinstance(
        error, OfflineModeIsEnabled
    )


def _cause(error: Exception) -> Exception:
    """What is behind an error of an upload, which huggingface_hub wraps."""
    while type(error) is RuntimeError and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def as_hub_error(error: Exception, where: str, fix: str = LATER) -> HubError:
    """An error of ours that says what one of the Hub means.

    Args:
        error: that was raised.
        where: the repository that it is about.
        fix: what to do about the push that failed.
    """
    if isinstance(error, HubError):
        return error
    error = _cause(error)
    status = None
    if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
        status = error.response.status_code
    text = getattr(error, "server_message", None) or one_line(error)
    if isinstance(error, LocalTokenNotFoundError):
        return HubError(Problem(where, "no token to push with", f"{LOG_IN}. {fix}"))
    if isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return HubError(Problem(where, "HF_HUB_OFFLINE is set, so nothing can be pushed", f"Unset it. {fix}"))
    if status == 401:
        return HubError(Problem(where, f"the token is not valid ({text})", f"{LOG_IN}. {fix}"))
    if status == 403:
        return HubError(Problem(where, f"no permission to write there ({text})", fix))
    if status == 404:
        return HubError(Problem(where, f"not found, or not yours to see ({text})", fix))
    return HubError(Problem(where, text, fix))
