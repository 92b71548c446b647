"""The results of a study: one line of JSON per run, written as soon as it is known."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nio_hf.errors import Problem, RecipeError
from nio_hf.files import output_errors
from nio_hf.hub.run_folder import versions
from nio_hf.study.plan import Arm, Run

RESULTS_NAME = "runs.jsonl"
_FORMAT = 2
_START = f'{{"format": {_FORMAT}, "task": '.encode()
"""Beginning of a file of results."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        value: Displayed value of the metric at the end; None for a run that failed.
        eval_loss: Evaluation loss at the end; None for a run that failed.
        losses: Training loss of each step.
        grad_norms: Gradient norm of each step, before clipping.
        steps: Number of training steps, without the initialisation.
        cost_steps: Cost of the initialisation in training steps.
        cost_seconds: Seconds of the initialisation.
        seconds: Seconds of the run.
        error: Reason of a failure; None for a run that did not fail.
        initialisation: Measurements of the initialisation; None without one.
        diagnostics: Measurements of the first steps; empty without `--diagnostics`.
    """

    value: float | None = None
    eval_loss: float | None = None
    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()
    steps: int = 0
    cost_steps: float = 0.0
    cost_seconds: float = 0.0
    seconds: float = 0.0
    error: str | None = None
    initialisation: dict[str, Any] | None = None
    diagnostics: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Outcome:
        """Rebuild an outcome from its fields in JSON."""
        for name in ("value", "eval_loss"):
            value = fields[name]
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                raise ValueError(f"{name} is {value!r}")
        return cls(**{**fields, "losses": tuple(fields["losses"]), "grad_norms": tuple(fields["grad_norms"])})

    def value_or(self, worst: float) -> float:
        """Return the value of the metric, or `worst` for a run that failed."""
        return worst if self.value is None else self.value

    @property
    def final_loss(self) -> float | None:
        """Mean training loss of the last tenth of the steps; None for a run that failed."""
        last = self.losses[-max(len(self.losses) // 10, 1) :]
        return sum(last) / len(last) if last and self.error is None else None


class Results:
    """The outcomes of the runs that have ended, in a file.

    Args:
        directory: Directory of the file.
        task: Settings that all runs share. A file with another task is refused.

    Raises:
        RecipeError: A file with another task or of a former version, or one that is no file of results.
    """

    def __init__(self, directory: Path, task: Mapping[str, Any]) -> None:
        self._file = directory / RESULTS_NAME
        self._outcomes: dict[Run, tuple[dict[str, Any], Outcome]] = {}
        with output_errors(directory, trained=False):
            content = self._file.read_bytes() if self._file.is_file() else b""
            if b"\n" not in content and _START.startswith(content[: len(_START)]):
                # A former command ended while it wrote the first line.
                self._file.unlink(missing_ok=True)
                self._append({"format": _FORMAT, "task": task})
            else:
                self._read(content, json.loads(json.dumps(task)))

    def get(self, run: Run, arm: Arm) -> Outcome | None:
        """Return the outcome of a run; None for a run that has not ended.

        Raises:
            RecipeError: A run of the same key with other settings.
        """
        settings, outcome = self._outcomes.get(run, (None, None))
        if settings is not None and settings != json.loads(json.dumps(arm.settings)):
            fix = "Give the arm another name, or another --output_dir"
            raise RecipeError(Problem(str(self._file), f"holds runs of {arm.name} with other settings", fix))
        return outcome

    def add(self, run: Run, arm: Arm, outcome: Outcome) -> None:
        """Append a run to the file, on the disk."""
        record = {"run": dataclasses.asdict(run), "settings": arm.settings, "outcome": dataclasses.asdict(outcome)}
        self._append({**record, "versions": versions()})

    def _read(self, content: bytes, task: dict[str, Any]) -> None:
        *lines, rest = content.split(b"\n")
        place, fix = f"{self._file}, line 1", "Move it away, or give another --output_dir"
        try:
            header = json.loads(lines[0]) if lines else {}
            if header["format"] != _FORMAT or not isinstance(header["task"], dict):
                former = " is that of a former version" if header["format"] in range(_FORMAT) else ""
                raise ValueError(f"format {header['format']}{former}, known is {_FORMAT}")
            for number, line in enumerate(lines[1:], 2):
                place = f"{self._file}, line {number}"
                record = json.loads(line)
                entry = (record["settings"], Outcome.from_dict(record["outcome"]))
                self._outcomes.setdefault(Run(**record["run"]), entry)
        except (ValueError, KeyError, TypeError) as error:
            kind = f"no {error}" if isinstance(error, KeyError) else error
            raise RecipeError(Problem(place, f"is no results file: {kind}", fix)) from error
        if header["task"] != task:
            fix = "Give another --output_dir, or the settings that it was begun with"
            found = f"holds the results of something else: {_difference(header['task'], task)}"
            raise RecipeError(Problem(str(self._file), found, fix))
        if rest:
            os.truncate(self._file, len(content) - len(rest))

    def _append(self, record: Mapping[str, Any]) -> None:
        with output_errors(self._file, trained=False), self._file.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _difference(found: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    there, here = (
        {"purpose": "compare", **each, **(each.get("settings") or {}), "settings": 0} for each in (found, task)
    )
    changed = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    return ", ".join(f"{key} is {there.get(key)!r} there, {here.get(key)!r} here" for key in changed)
