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
"""The beginning of a file of results."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        value: Value of the metric at the end, as it is shown; None where the run failed, as `eval_loss`.
        losses: Training loss of each step.
        grad_norms: Gradient norm of each step, before clipping.
        steps: Training steps, without the cost of the initialisation, which is `cost_steps` training steps.
        error: Reason for which the run failed; None where it did not.
        initialisation: Measurements of the method; None where there was none.
        diagnostics: Measurements of the first steps; empty where they were not asked for.
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

    def value_or(self, worst: float) -> float:
        """The value of the metric, or `worst` where the run failed."""
        return worst if self.value is None else self.value

    @property
    def final_loss(self) -> float | None:
        """Mean training loss of the last tenth of the steps; None where the run failed."""
        last = self.losses[-max(len(self.losses) // 10, 1) :]
        return sum(last) / len(last) if last and self.error is None else None


class Results:
    """The runs that have ended, by their keys.

    Args:
        directory: Directory that holds the file of results.
        task: What all runs have in common, by which the results of something else are told.

    Raises:
        RecipeError: for a file of something else, or of a former version.
    """

    def __init__(self, directory: Path, task: Mapping[str, Any]) -> None:
        self._file = directory / RESULTS_NAME
        self._outcomes: dict[Run, tuple[dict[str, Any], Outcome]] = {}
        with output_errors(directory, trained=False):
            content = self._file.read_bytes() if self._file.is_file() else b""
            if b"\n" not in content and _START.startswith(content[: len(_START)]):
                # A command that ended while it wrote the first line.
                self._file.unlink(missing_ok=True)
                self._append({"format": _FORMAT, "task": task})
            else:
                self._read(content, json.loads(json.dumps(task)))

    def get(self, run: Run, arm: Arm) -> Outcome | None:
        """The outcome of a run; None where it has not ended.

        Raises:
            RecipeError: where a run of that key had other settings.
        """
        settings, outcome = self._outcomes.get(run, (None, None))
        if settings is not None and settings != json.loads(json.dumps(arm.settings)):
            fix = "Give the arm another name, or another --output_dir"
            raise RecipeError(Problem(str(self._file), f"holds runs of {arm.name} with other settings", fix))
        return outcome

    def add(self, run: Run, arm: Arm, outcome: Outcome) -> None:
        """Append a run; it is on the disk when this returns."""
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
