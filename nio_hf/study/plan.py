"""Plans of studies: arms, each at several learning rates and lengths of warmup, from several seeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from nio_hf.errors import Problem

Stage = Literal["probe", "selection", "verdict"]
FIRST_VERDICT_SEED = 1000
"""First seed of the verdict; seeds of the selection begin at 0."""
MIN_SEEDS = 3
"""Least number of paired seeds for a verdict."""
WITH_NIO = {"nio": True, "nio_method": "nio", "nio_method_kwargs": None}
"""Settings of an arm that starts with NIO."""
QUIET = {
    "report_to": "none",
    "disable_tqdm": True,
    "logging_strategy": "steps",
    "logging_steps": 1,
    **dict.fromkeys(("save_strategy", "eval_strategy"), "no"),
    **dict.fromkeys(("push_to_hub", "load_best_model_at_end", "enable_jit_checkpoint"), False),
    **dict.fromkeys(("nio_save_init", "logging_nan_inf_filter"), False),
}
"""Settings of every run, which only trains and is evaluated at the end."""
DECIDED = {
    **dict.fromkeys(("max_steps", "num_train_epochs"), "Use --steps"),
    **dict.fromkeys(("seed", "data_seed", "nio_seed"), "Use --seeds"),
    "eval_from_train": "Leave it out: a part of the training data chooses, the evaluation data judge",
    "resume_from_checkpoint": "Leave it out: the same command goes on",
    "push_to_hub": "Leave it out: the trainings of a study are not pushed",
}
"""{setting of the recipe that every study decides itself: advice}."""
Point = tuple[str, float, float]
"""Name of an arm, learning rate, length of warmup."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to start a training: its settings of the recipe, and whether it warms up."""

    name: str
    description: str
    settings: Mapping[str, Any]
    has_warmup: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """The key of one training.

    Runs of one seed are paired: they start from the same weights and see the same batches.

    Attributes:
        stage: "verdict", which is evaluated on the evaluation data, "selection" or, with a few steps, "probe", which
            are evaluated on a part of the training data.
        arm: Name of the arm.
        learning_rate: Peak learning rate.
        warmup_ratio: Length of warmup as a share of the steps.
        seed: Seed of the training.
    """

    stage: Stage
    arm: str
    learning_rate: float
    warmup_ratio: float
    seed: int

    @property
    def point(self) -> Point:
        """Point of the grid."""
        return self.arm, self.learning_rate, self.warmup_ratio

    @property
    def name(self) -> str:
        """Name for files."""
        warmup = f"-w{self.warmup_ratio:g}" if self.warmup_ratio else ""
        return f"{self.stage}-{self.arm}-lr{self.learning_rate:g}{warmup}-s{self.seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a study.

    Attributes:
        arms: Arms that are compared.
        learning_rates: Peak learning rates, rising.
        warmup_ratios: Lengths of warmup as shares of the steps, for arms with warmup.
        seeds: Number of seeds of the selection.
        verdict_seeds: Number of fresh seeds of the verdict; 0 for no verdict.
        steps: Budget of a whole training, in training steps, initialisation included.
        budget: Largest number of training steps of all runs together; None for no limit.
        probe_steps: Budget of a probe; 0 for a study without probes.
    """

    arms: tuple[Arm, ...]
    learning_rates: tuple[float, ...]
    warmup_ratios: tuple[float, ...]
    seeds: int
    verdict_seeds: int
    steps: int
    budget: int | None = None
    probe_steps: int = 0

    def arm(self, name: str) -> Arm:
        """Return the arm with a name."""
        return next(arm for arm in self.arms if arm.name == name)

    def points(self) -> list[Point]:
        """Return the points of the grid, arm by arm."""
        return [
            (arm.name, rate, ratio)
            for arm in self.arms
            for rate in self.learning_rates
            for ratio in (self.warmup_ratios if arm.has_warmup else (0.0,))
        ]

    def selection(self) -> list[Run]:
        """Return the runs of the grid, seed by seed, so that every arm has a first result early."""
        by_rate = sorted(self.points(), key=lambda point: point[1])
        return [Run("selection", *point, seed) for seed in range(self.seeds) for point in by_rate]

    def fresh(self, points: Sequence[Point]) -> list[Run]:
        """Return the runs of points of the grid on the seeds of the verdict."""
        seeds = range(FIRST_VERDICT_SEED, FIRST_VERDICT_SEED + self.verdict_seeds)
        return [Run("verdict", *point, seed) for seed in seeds for point in points]

    def budget_of(self, run: Run) -> int:
        """Return the training steps of a run, its initialisation included."""
        return self.probe_steps if run.stage == "probe" else self.steps

    def settings(self, run: Run) -> dict[str, Any]:
        """Return the settings of a run, without those of its arm."""
        steps = self.budget_of(run)
        return {
            "learning_rate": run.learning_rate,
            "warmup_steps": round(run.warmup_ratio * steps),
            "max_steps": steps,
            "eval_from_train": run.stage != "verdict",
            # All that is random is drawn anew for each seed.
            **{"seed": run.seed, "data_seed": None, "nio_seed": None},
        }


def seed_problems(plan: Plan) -> Iterator[Problem]:
    """Yield the problem of a number of seeds that is out of range."""
    if not 1 <= plan.seeds <= FIRST_VERDICT_SEED:
        yield Problem("--seeds", f"{plan.seeds}", f"Give 1 to {FIRST_VERDICT_SEED}")


def are_distinct(values: Iterable[float]) -> bool:
    """Whether values differ in the names of runs."""
    names = [f"{value:g}" for value in values]
    return len(set(names)) == len(names)


def grid_problems(option: str, values: Sequence[float], example: str) -> Iterator[Problem]:
    """Yield the problem of values that are missing, equal, not finite or not above 0."""
    if not values:
        yield Problem(option, "none", f"Give at least one, e.g. {example}")
    elif not (are_distinct(values) and all(0 < value < math.inf for value in values)):
        yield Problem(option, ", ".join(f"{value:g}" for value in values), "Give different ones above 0")
