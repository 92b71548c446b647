"""The runs of a comparison: a grid on seeds to choose by, and the chosen ones on fresh seeds to judge by."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from nio_hf.comparison.arms import NO_WARMUP, WARMUP
from nio_hf.errors import Problem, RecipeError
from nio_hf.trials.run import FIRST_VERDICT_SEED, MIN_SEEDS, Arm, Run, Trial, are_distinct, can_be_tried, format_number


@dataclasses.dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        arms: what is compared.
        learning_rates: peak learning rates of the grid, rising.
        warmup_ratios: lengths of warmup of the grid, as shares of the steps; for arms with warmup.
        seeds: number of seeds of the selection.
        verdict_seeds: number of fresh seeds of the verdict; 0 for no verdict.
        steps: budget of a run, in training steps, initialisation included.
        budget: training steps of all runs together that are allowed; None for no limit.
    """

    arms: tuple[Arm, ...]
    learning_rates: tuple[float, ...]
    warmup_ratios: tuple[float, ...]
    seeds: int
    verdict_seeds: int
    steps: int
    budget: int | None = None

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise RecipeError(*problems)

    def _problems(self) -> Iterator[Problem]:
        rates = self.learning_rates
        if not rates:
            yield Problem("--learning_rates", "none", "Give at least one, e.g. 5e-4,1e-3,2e-3")
        if not can_be_tried(rates):
            yield Problem("--learning_rates", ", ".join(map(format_number, rates)), "Give different ones above 0")
        if not 1 <= self.seeds <= FIRST_VERDICT_SEED:
            yield Problem("--seeds", f"{self.seeds}", f"Give 1 to {FIRST_VERDICT_SEED}")
        if self.steps < 1:
            yield Problem("--steps", f"{self.steps}", "Give at least 1")
        ratios = ", ".join(f"{ratio:g}" for ratio in self.warmup_ratios)
        if any(not 0 < ratio < 1 for ratio in self.warmup_ratios) or not are_distinct(self.warmup_ratios):
            yield Problem("--warmup_ratios", ratios, "Give different shares of the steps in (0, 1)")
        elif any(arm.has_warmup for arm in self.arms) and not ratios:
            yield Problem("--warmup_ratios", "none, with an arm that warms up", "Give at least one, e.g. 0.1")
        elif any(arm.has_warmup for arm in self.arms) and round(min(self.warmup_ratios) * self.steps) < 1:
            found = f"{ratios}, of which the least is no whole step of {self.steps}"
            yield Problem("--warmup_ratios", found, f"Give {1 / max(self.steps, 1):.2g} or more")
        if self.verdict_seeds:
            yield from self._verdict_problems()

    def _verdict_problems(self) -> Iterator[Problem]:
        if self.verdict_seeds < MIN_SEEDS or self.seeds < MIN_SEEDS:
            found = f"{self.seeds} to choose by and {self.verdict_seeds} to judge by"
            fix = f"Give {MIN_SEEDS} or more of both for a verdict, or --no_verdict"
            yield Problem("--seeds, --verdict_seeds", found, fix)
        missing = [name for name in (NO_WARMUP, WARMUP) if name not in {arm.name for arm in self.arms}]
        if missing:
            fix = "Add it to --arms, or give --no_verdict"
            yield Problem("--arms", f"no {' and no '.join(missing)} to hold the others against", fix)

    def arm(self, name: str) -> Arm:
        """The arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)

    def grid(self) -> list[Run]:
        """The runs of the selection: seed by seed, so that every arm has a first result early."""
        return [
            Run("selection", arm.name, rate, ratio, seed)
            for seed in range(self.seeds)
            for rate in self.learning_rates
            for arm in self.arms
            for ratio in self.ratios(arm)
        ]

    def least_runs(self) -> int:
        """Number of runs where the verdict needs no more than the chosen ones."""
        return len(self.grid()) + self.verdict_seeds * len(self.arms)

    def most_runs(self) -> int:
        """Number of runs where it needs two arms at further settings, too: warmup and none, where that gained most."""
        return self.least_runs() + 2 * self.verdict_seeds

    def verdict_runs(self, chosen: Sequence[Choice]) -> list[Run]:
        """The runs of the verdict: each arm at its chosen settings, on seeds that the choice has not seen."""
        return [
            Run("verdict", choice.arm, choice.learning_rate, choice.warmup_ratio, FIRST_VERDICT_SEED + number)
            for number in range(self.verdict_seeds)
            for choice in chosen
        ]

    def trials(self, runs: Iterable[Run]) -> list[Trial]:
        """Runs with all that makes them."""
        return [Trial(run, self.arm(run.arm), self.steps) for run in runs]

    def gain_runs(self, learning_rate: float, warmup_ratio: float) -> list[Run]:
        """The runs that tell on fresh seeds whether warmup gains something at a learning rate."""
        return [
            Run("verdict", arm, learning_rate, ratio, FIRST_VERDICT_SEED + number)
            for number in range(self.verdict_seeds)
            for arm, ratio in ((NO_WARMUP, 0.0), (WARMUP, warmup_ratio))
        ]

    def ratios(self, arm: Arm) -> tuple[float, ...]:
        """The lengths of warmup that an arm is tried at."""
        return self.warmup_ratios if arm.has_warmup else (0.0,)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The settings that an arm is judged at.

    Attributes:
        arm: its name.
        learning_rate: with the best mean value of the selection.
        warmup_ratio: likewise.
        value: that mean.
    """

    arm: str
    learning_rate: float
    warmup_ratio: float
    value: float
