"""Conclusions from the runs of a study, with their uncertainty.

Letters: a an arm, w warmup at its best length, s a seed, v a value of the metric.

    difference   d_s = v(a, s) - v(w, s), or v(w, s) - v(a, s) for a metric whose lower values are better, each at its
                 chosen settings, over n fresh seeds, with the 90% t interval, Holm-corrected for the number of arms
                 that are compared with warmup; it is positive for a better arm
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from functools import cached_property

from nio_hf.metrics import Metric
from nio_hf.study.arms import NO_WARMUP, WARMUP
from nio_hf.study.intervals import Interval, Word, corrected, interval, judge, paired_gain
from nio_hf.study.plan import Arm, Plan, Point, Run
from nio_hf.study.results import Outcome


@dataclasses.dataclass(frozen=True)
class Cell:
    """The runs of one arm at one learning rate and length of warmup, over the seeds of the selection.

    Attributes:
        values: {seed: value of the metric}.
        losses: Mean training loss of the last tenth of the steps, of each run that did not fail.
        failed: Number of runs that failed.
    """

    arm: str
    learning_rate: float
    warmup_ratio: float
    values: Mapping[int, float]
    losses: tuple[float, ...]
    failed: int

    @property
    def point(self) -> Point:
        """Point of the grid."""
        return self.arm, self.learning_rate, self.warmup_ratio

    @property
    def value(self) -> float:
        """Mean of `values`."""
        return statistics.fmean(self.values.values())

    @property
    def spread(self) -> float:
        """Standard deviation of the value over the seeds; NaN for one seed."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else math.nan

    @property
    def loss(self) -> float:
        """Mean of `losses`; NaN where every run failed."""
        return statistics.fmean(self.losses) if self.losses else math.nan


@dataclasses.dataclass(frozen=True)
class Stability:
    """The stable learning rates of an arm: from the best one up to the last before the first that is too high.

    A rate is too high if a run fails, or if the mean value is farther from the best of the arm than the plateau of the
    metric.

    Attributes:
        up_to: Highest stable rate; None if every rate has a run that failed.
        fails_from: Lowest rate that is too high; None if no rate is.
    """

    up_to: float | None
    fails_from: float | None


@dataclasses.dataclass(frozen=True)
class Gain:
    """The gain of a length of warmup over no warmup at one learning rate, paired by seed."""

    learning_rate: float
    warmup_ratio: float
    gain: Interval


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The comparison of an arm with warmup on fresh seeds, each at its chosen settings: mean value and gain."""

    arm: str
    choice: Cell
    value: Interval
    difference: Interval
    word: Word


@dataclasses.dataclass(frozen=True)
class Share:
    """The gain of an arm over the arm that differs from it in the initialisation only."""

    arm: str
    without: str
    difference: Interval


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The outcomes of a study so far.

    Attributes:
        worst: Value that stands for a run that failed.
        evaluated: Number of evaluation samples that all seeds share; None if each seed has others.
    """

    title: str
    plan: Plan
    outcomes: Mapping[Run, Outcome]
    metric: Metric
    worst: float
    evaluated: int | None = None

    def fresh_values(self, point: Point) -> list[float]:
        """Return the value of a point of the grid on each fresh seed; none while runs are missing."""
        runs = self.plan.fresh([point])
        if any(run not in self.outcomes for run in runs):
            return []
        return [self.outcomes[run].value_or(self.worst) for run in runs]


@dataclasses.dataclass(frozen=True)
class Findings(Evidence):
    """The conclusions of a comparison so far."""

    @cached_property
    def cells(self) -> list[Cell]:
        """Cells of the grid that have all their runs."""
        found = []
        for arm, rate, ratio in self.plan.points():
            runs = [Run("selection", arm, rate, ratio, seed) for seed in range(self.plan.seeds)]
            if any(run not in self.outcomes for run in runs):
                continue
            own = {run.seed: self.outcomes[run] for run in runs}
            values = {seed: outcome.value_or(self.worst) for seed, outcome in own.items()}
            losses = tuple(outcome.final_loss for outcome in own.values() if outcome.final_loss is not None)
            failed = sum(outcome.error is not None for outcome in own.values())
            found.append(Cell(arm, rate, ratio, values, losses, failed))
        return found

    def best(self, arm: str, rate: float | None = None) -> Cell | None:
        """Return the best cell of an arm, at a rate if given; among equals the lowest rate and the shortest warmup."""
        own = [cell for cell in self.cells if cell.arm == arm and rate in (None, cell.learning_rate)]
        return max(own, key=lambda cell: self.metric.merit(cell.value), default=None)

    @cached_property
    def chosen(self) -> list[Cell]:
        """Best cell of each arm, at whose settings it is judged; none while the grid is not complete."""
        is_complete = len(self.cells) == len(self.plan.points())
        best = [self.best(arm.name) for arm in self.plan.arms] if is_complete else []
        return [cell for cell in best if cell is not None]

    def stability(self, arm: str) -> Stability:
        """Return the stable learning rates of an arm, each at its best length of warmup."""
        own = [cell for rate in self.plan.learning_rates if (cell := self.best(arm, rate)) is not None]
        whole = [cell for cell in own if not cell.failed]
        if not whole:
            return Stability(None, own[0].learning_rate if own else None)
        best = max(whole, key=lambda cell: self.metric.merit(cell.value))
        up_to = best.learning_rate
        for cell in own[own.index(best) + 1 :]:
            if cell.failed or self.metric.gain(best.value, cell.value) > self.metric.plateau:
                return Stability(up_to, cell.learning_rate)
            up_to = cell.learning_rate
        return Stability(up_to, None)

    @cached_property
    def gains(self) -> list[Gain]:
        """Gains of warmup at its best length over no warmup, by learning rate, on the seeds of the selection."""
        found = []
        for rate in self.plan.learning_rates:
            warm, cold = (self.best(name, rate) for name in (WARMUP, NO_WARMUP))
            if warm is not None and cold is not None:
                gain = paired_gain(self.metric, list(warm.values.values()), list(cold.values.values()))
                found.append(Gain(rate, warm.warmup_ratio, gain))
        return found

    @property
    def largest_gain(self) -> Gain | None:
        """Largest gain of warmup; None if there is no gain to choose from."""
        return max(self.gains, key=lambda gain: gain.gain.mean, default=None)

    @property
    def judged(self) -> list[Point]:
        """Points for the fresh seeds: the choice of each arm, and both sides of the largest gain of warmup."""
        most = self.largest_gain
        points = [choice.point for choice in self.chosen]
        if most is not None:
            points += [(NO_WARMUP, most.learning_rate, 0.0), (WARMUP, most.learning_rate, most.warmup_ratio)]
        return list(dict.fromkeys(points))

    @cached_property
    def tested_gain(self) -> Gain | None:
        """Largest gain of warmup, measured again on fresh seeds; None while runs are missing."""
        most = self.largest_gain
        if most is None or not self.chosen:
            return None
        warm = self.fresh_values((WARMUP, most.learning_rate, most.warmup_ratio))
        cold = self.fresh_values((NO_WARMUP, most.learning_rate, 0.0))
        return dataclasses.replace(most, gain=paired_gain(self.metric, warm, cold)) if warm and cold else None

    @property
    def no_warmup_loses(self) -> bool:
        """Whether the gain of warmup is significant. If it is not, there is nothing to replace."""
        return self.tested_gain is not None and self.tested_gain.gain.low > 0

    @cached_property
    def _fresh(self) -> dict[str, list[float]]:
        """{arm: values on the fresh seeds}; empty while runs are missing."""
        by_arm = {choice.arm: self.fresh_values(choice.point) for choice in self.chosen}
        return by_arm if all(by_arm.values()) else {}

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """Comparison of every arm with warmup; empty while runs are missing."""
        if not self._fresh:
            return []
        samples = {arm: paired_gain(self.metric, own, self._fresh[WARMUP]).values for arm, own in self._fresh.items()}
        differences = {WARMUP: interval(samples.pop(WARMUP)), **corrected(samples)}
        values = {arm: interval(own) for arm, own in self._fresh.items()}
        words = {arm: judge(difference, self.metric.margin) for arm, difference in differences.items()}
        return [Verdict(c.arm, c, values[c.arm], differences[c.arm], words[c.arm]) for c in self.chosen]

    @cached_property
    def shares(self) -> list[Share]:
        """Gain of each initialisation whose arm without it is in the plan; empty while runs are missing."""
        found = {}
        for arm in self.plan.arms if self._fresh else ():
            without = next((other.name for other in self.plan.arms if _is_without_initialisation(other, arm)), None)
            if without is not None:
                gain = paired_gain(self.metric, self._fresh[arm.name], self._fresh[without])
                found[arm.name, without] = gain.values
        return [Share(*names, difference) for names, difference in corrected(found).items()]


def _is_without_initialisation(other: Arm, arm: Arm) -> bool:
    """Whether `other` is the training of `arm` without its initialisation."""
    if not arm.settings.get("nio") or other.settings.get("nio") or other.has_warmup != arm.has_warmup:
        return False
    own = {"nio", *(key for key in arm.settings if key.startswith("nio_"))} - {"nio_seed_optimizer"}
    rest, others = ({k: v for k, v in each.settings.items() if k not in own} for each in (arm, other))
    return rest == others
