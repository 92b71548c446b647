"""Errors that a user of nio_hf can cause. Each says where it is, what was found, and how to fix it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        where: Argument, file and key, or tensor that the problem is about.
        found: Finding at that place.
        fix: Advice to the user, as an imperative sentence without its full stop.
    """

    where: str
    found: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.found}. {self.fix}{'' if self.fix.endswith('?') else '.'}"


class NIOError(Exception):
    """Base of all errors of nio_hf. It carries all problems that were found.

    Args:
        problems: Problems, at least one. A worker of a data loader passes the text of its traceback instead, which
            ends with the message.
    """

    def __init__(self, *problems: Problem | str) -> None:
        if not problems:
            raise TypeError(f"{type(self).__name__} needs at least one Problem")
        self.problems = tuple(problem for problem in problems if isinstance(problem, Problem))
        super().__init__(*problems)

    def __str__(self) -> str:
        if not self.problems:
            return re.split(r"^[\w.]+Error: ", str(self.args[0]), flags=re.MULTILINE)[-1].strip()
        if len(self.problems) == 1:
            return str(self.problems[0])
        lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1))
        return f"{len(self.problems)} problems:\n{lines}"


class ConfigError(NIOError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class MetricError(ConfigError, KeyError):
    """A metric that no evaluation has."""


class ModelError(NIOError, ValueError):
    """A model that NIO cannot initialise as it is."""


class DataError(NIOError, ValueError):
    """Data that is missing, too small, or not what the model expects."""


class BrokenImageError(DataError):
    """An image that cannot be read."""


class NumericsError(NIOError, ArithmeticError):
    """A loss or gradient that is not finite, or gradients that are all zero."""


class NIOMemoryError(NIOError, MemoryError):
    """A run of NIO that does not fit into the memory of the device."""


class RankError(NIOError, RuntimeError):
    """An error in one of several processes, which stops all of them."""


class StoppedError(NIOError, RuntimeError):
    """A run that was asked to stop, and has saved the state to go on from."""


class RecipeError(NIOError, ValueError):
    """A recipe that cannot be read or does not validate."""


class CheckpointError(NIOError, ValueError, RuntimeError):
    """A checkpoint that is incomplete or belongs to another model."""


class NoCheckpointError(CheckpointError, FileNotFoundError):
    """A folder that is missing, or is no checkpoint."""


class OutputError(NIOError, OSError):
    """An output directory that cannot be written."""


class HubError(NIOError, RuntimeError):
    """A request that the Hugging Face Hub refuses, or a Hub that cannot be reached."""


class MissingExtraError(NIOError, ImportError):
    """A part of the package whose extra is not installed."""


class Preempted(SystemExit):
    """A run that SIGTERM ended after a save. A script that does not catch it exits with status 75.

    This status is EX_TEMPFAIL of sysexits.h: try again later.
    """

    STATUS = 75

    def __init__(self, message: str) -> None:
        super().__init__(self.STATUS)
        self.message = message

    def __str__(self) -> str:
        return self.message


def listed(names: Sequence[str], most: int) -> str:
    """Join names by commas; of more than `most` names, the last part is the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def one_line(error: BaseException) -> str:
    """Return the message of a foreign error in one line, for use inside an error of this package."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
