"""The results of trials: one line of JSON per run, written as soon as it is known."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from nio_hf.errors import Problem, RecipeError
from nio_hf.files import output_errors
from nio_hf.hub.run_folder import versions
from nio_hf.trials.run import Arm, Run

RESULTS_NAME = "runs.jsonl"
_LOCK_NAME = ".lock"
_FORMAT = 2
_START = f'{{"format": {_FORMAT}, "task": '.encode()
"""What a file of results begins with."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        value: of the metric at the end, as it is shown; None where it failed.
        eval_loss: at the end; None where it failed.
        losses: training loss of each step.
        grad_norms: gradient norm of each step, before clipping.
        steps: of training, after the cost of the initialisation.
        cost_steps: cost of the initialisation, in training steps.
        cost_seconds: wall time of the initialisation.
        seconds: wall time of the whole run.
        error: why it failed; None where it did not.
        initialisation: measurements of the method; None where there was none.
        diagnostics: of the first steps; empty where they were not asked for.
    """

    value: float | None
    eval_loss: float | None
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    steps: int
    cost_steps: float
    cost_seconds: float
    seconds: float
    error: str | None = None
    initialisation: dict[str, Any] | None = None
    diagnostics: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Outcome:
        """Inverse of `dataclasses.asdict`, after a trip through JSON."""
        for name in ("value", "eval_loss"):
            value = fields[name]
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                raise ValueError(f"{name} is {value!r}")
        return cls(**{**fields, "losses": tuple(fields["losses"]), "grad_norms": tuple(fields["grad_norms"])})

    @classmethod
    def failure(cls, error: str, seconds: float, cost_steps: float = 0.0) -> Outcome:
        """A run that failed before its training."""
        return cls(None, None, (), (), 0, cost_steps, 0.0, seconds, error=error)

    def value_or(self, worst: float) -> float:
        """The value of the metric, or `worst` where the run failed."""
        return worst if self.value is None else self.value

    @property
    def final_loss(self) -> float | None:
        """Mean training loss of the last tenth of the steps."""
        last = self.losses[-max(len(self.losses) // 10, 1) :]
        return sum(last) / len(last) if last and self.error is None else None


class Results:
    """The runs that have ended, by what they are.

    Args:
        directory: to keep them in.
        task: what all runs have in common, by which the results of something else are told.
    """

    def __init__(self, directory: Path, task: Mapping[str, Any]) -> None:
        self._file = directory / RESULTS_NAME
        self._task = _plain(task)
        self._outcomes: dict[Run, tuple[dict[str, Any], Outcome]] = {}
        with output_errors(directory, trained=False):
            directory.mkdir(parents=True, exist_ok=True)
            content = self._file.read_bytes() if self._file.is_file() else b""
            if _is_unfinished_start(content):
                self._file.unlink(missing_ok=True)
                self._append({"format": _FORMAT, "task": self._task})
            else:
                self._read(content)

    def get(self, run: Run, arm: Arm) -> Outcome | None:
        """The outcome of a run; None where it has not ended.

        Raises:
            RecipeError: where a run of that name had other settings.
        """
        settings, outcome = self._outcomes.get(run, (None, None))
        if settings is not None and settings != _plain(arm.settings):
            fix = "Give the arm another name, or another --output_dir"
            raise RecipeError(Problem(str(self._file), f"holds runs of {arm.name} with other settings", fix))
        return outcome

    def add(self, run: Run, arm: Arm, outcome: Outcome) -> None:
        """Append a run; it is on the disk when this returns."""
        settings = _plain(arm.settings)
        record = {"run": dataclasses.asdict(run), "settings": settings, "outcome": dataclasses.asdict(outcome)}
        self._append({**record, "versions": versions()})
        self._outcomes[run] = (settings, outcome)

    def _read(self, content: bytes) -> None:
        *lines, rest = content.split(b"\n")
        found: dict[str, Any] = {}
        fix = "Move it away, or give another --output_dir"
        if not lines:
            raise RecipeError(Problem(str(self._file), "is no results file: it has no whole line", fix))
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if number == 1:
                    found = self._task_of(record)
                else:
                    self._take(record)
            except (ValueError, KeyError, TypeError) as error:
                kind = f"no {error}" if isinstance(error, KeyError) else error
                raise RecipeError(
                    Problem(f"{self._file}, line {number}", f"is no results file: {kind}", fix)
                ) from error
        if found != self._task:
            fix = "Give another --output_dir, or the settings that it was begun with"
            raise RecipeError(Problem(str(self._file), f"holds the results of {_difference(found, self._task)}", fix))
        if rest:
            self._mend(rest)

    def _mend(self, rest: bytes) -> None:
        """Take a last line that lacks nothing but its end, and remove one that was cut off in the middle."""
        try:
            self._take(json.loads(rest))
        except (ValueError, KeyError, TypeError):
            with self._file.open("r+b") as file:
                file.truncate(self._file.stat().st_size - len(rest))
        else:
            with self._file.open("ab") as file:
                file.write(b"\n")

    @staticmethod
    def _task_of(header: dict[str, Any]) -> dict[str, Any]:
        if header["format"] != _FORMAT or not isinstance(header["task"], dict):
            former = " is that of a former version" if header["format"] in range(_FORMAT) else ""
            raise ValueError(f"format {header['format']}{former}, known is {_FORMAT}")
        task: dict[str, Any] = header["task"]
        return task

    def _take(self, record: dict[str, Any]) -> None:
        outcome = Outcome.from_dict(record["outcome"])
        self._outcomes.setdefault(Run(**record["run"]), (record["settings"], outcome))

    def _append(self, record: dict[str, Any]) -> None:
        with output_errors(self._file, trained=False), self._file.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep a second process out of a directory.

    Raises:
        RecipeError: where another process works in it.
    """
    with output_errors(directory, trained=False):
        directory.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(directory / _LOCK_NAME)
    with output_errors(directory / _LOCK_NAME, trained=False):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            fix = "Wait for it, or give another --output_dir"
            raise RecipeError(Problem(str(directory), "another process is at work in it", fix)) from error
    try:
        yield
    finally:
        lock.release()


def _is_unfinished_start(content: bytes) -> bool:
    """Whether a file ends within its first line, in which nothing was written but what the file is."""
    return b"\n" not in content and _START.startswith(content[: len(_START)])


def _difference(found: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    """What results are of, where they are not those of a task."""
    commands = [f"nio-hf {each.get('purpose', 'compare')}" for each in (found, task)]
    if commands[0] != commands[1]:
        return f"{commands[0]}, and this is {commands[1]}"
    there, here = ({**each, **(each.get("settings") or {})} for each in (found, task))
    changed = sorted(key for key in there.keys() | here.keys() if key != "settings" and there.get(key) != here.get(key))
    return "something else: " + ", ".join(
        f"{key} is {there.get(key)!r} there, {here.get(key)!r} here" for key in changed
    )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they come back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(values)))
    return plain
