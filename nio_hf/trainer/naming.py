"""Messages of the core in the words of the Trainer: `NIOConfig.loss_bound` is `nio_loss_bound` here."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import TypeVar

from nio_hf.errors import NIOError, Problem

T = TypeVar("T", str, Problem)

_SETTING = re.compile(r"\bNIOConfig\.(\w+)")


def in_arguments(value: T) -> T:
    """A text or a problem with the settings of NIO called as arguments."""
    if isinstance(value, Problem):
        fields = {name: _SETTING.sub(r"nio_\1", text) for name, text in dataclasses.asdict(value).items()}
        return dataclasses.replace(value, **fields)
    return _SETTING.sub(r"nio_\1", value)


@contextlib.contextmanager
def named_as_arguments() -> Iterator[None]:
    """Let errors from within call the settings of NIO as arguments.

    Raises:
        NIOError: The one that was raised, of the same type.
    """
    try:
        yield
    except NIOError as error:
        error.problems = tuple(in_arguments(problem) for problem in error.problems)
        error.args = error.problems or error.args
        raise
