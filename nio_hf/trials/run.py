"""What a trial is: one training of a recipe, with an arm's settings, at a learning rate, from a seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

Stage = Literal["probe", "selection", "verdict"]
FIRST_VERDICT_SEED = 1000
"""Seeds to judge by count from here, those to choose by from 0."""
MIN_SEEDS = 3
"""Paired seeds below which nothing is judged."""
WITH_NIO = {"nio": True, "nio_method": "nio", "nio_method_kwargs": None}
"""Settings of an arm that starts with NIO."""


def format_number(value: float | None) -> str:
    """A number as the names of runs have it; "none" where there is none."""
    return "none" if value is None else f"{value:g}"


def are_distinct(values: Iterable[float | None]) -> bool:
    """Whether values are different as the names of runs have them."""
    names = [format_number(value) for value in values]
    return len(set(names)) == len(names)


def can_be_tried(values: Sequence[float | None]) -> bool:
    """Whether the values of a grid are different, finite and above 0; None, for no bound, may be among them."""
    return are_distinct(values) and all(value is None or 0 < value < math.inf for value in values)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to start a training.

    Attributes:
        name: of the arm.
        description: what it is, in a few words.
        settings: of the recipe, that make it.
        has_warmup: whether its learning rate rises over the first steps.
    """

    name: str
    description: str
    settings: Mapping[str, Any]
    has_warmup: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """Names one training.

    Attributes:
        stage: "verdict" is evaluated on the evaluation data, "probe" (of a few steps) and "selection" on a part of the
            training data.
        arm: name of its arm.
        learning_rate: peak of the schedule.
        warmup_ratio: length of warmup as a share of the steps; 0 for none.
        seed: of weights and data order. Runs of one seed are paired: they start from the same weights and see the same
            batches.
    """

    stage: Stage
    arm: str
    learning_rate: float
    warmup_ratio: float
    seed: int

    @property
    def name(self) -> str:
        """A name for files."""
        warmup = f"-w{self.warmup_ratio:g}" if self.warmup_ratio else ""
        return f"{self.stage}-{self.arm}-lr{self.learning_rate:g}{warmup}-s{self.seed}"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A training with all that makes it.

    Attributes:
        run: its name.
        arm: its settings.
        steps: its budget, in training steps.
        cost_share: part of the cost of the initialisation that is paid from the budget.
    """

    run: Run
    arm: Arm
    steps: int
    cost_share: float = 1.0

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the recipe that make it."""
        evaluated = {} if self.run.stage == "verdict" else {"eval_from_train": True}
        return {
            **self.arm.settings,
            **evaluated,
            "learning_rate": self.run.learning_rate,
            "warmup_steps": round(self.run.warmup_ratio * self.steps),
            "max_steps": self.steps,
            "seed": self.run.seed,
        }
