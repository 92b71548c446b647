"""What follows from the runs of a comparison, with its uncertainty.

Letters: a an arm, w warmup at its best length, s a seed, v a value of the metric.

    difference   d_s = v(a, s) - v(w, s), or v(w, s) - v(a, s) where less of the metric is better, each at its chosen
                 settings, over n fresh seeds, with its 90% t interval, Holm-corrected for the number of arms that are
                 held against warmup; so it is above 0 where the arm is better
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from nio_hf.comparison.arms import NO_WARMUP, WARMUP
from nio_hf.comparison.plan import Choice, Plan
from nio_hf.metrics import Metric
from nio_hf.trials.interval import Interval, corrected, interval, paired_gain
from nio_hf.trials.results import Outcome
from nio_hf.trials.run import Arm, Run

Word = Literal["beats", "matches", "undecided", "worse"]
Outcomes = Mapping[Run, Outcome]


@dataclasses.dataclass(frozen=True)
class Cell:
    """The runs of one arm at one learning rate and length of warmup, over the seeds of the selection.

    Attributes:
        arm: name.
        learning_rate: peak.
        warmup_ratio: length of warmup.
        values: {seed: value of the metric}; a run that failed counts as the worst value.
        losses: mean training loss of the last tenth of the steps, of the runs that did not fail.
        failed: number of runs that failed.
    """

    arm: str
    learning_rate: float
    warmup_ratio: float
    values: Mapping[int, float]
    losses: tuple[float, ...]
    failed: int

    @property
    def value(self) -> float:
        """Mean of `values`."""
        return statistics.fmean(self.values.values())

    @property
    def spread(self) -> float:
        """Standard deviation of the value over the seeds; NaN for one seed."""
        values = list(self.values.values())
        return statistics.stdev(values) if len(values) > 1 else math.nan

    @property
    def loss(self) -> float:
        """Mean of `losses`; NaN where every run failed."""
        return statistics.fmean(self.losses) if self.losses else math.nan


def cells(plan: Plan, outcomes: Outcomes, worst: float) -> list[Cell]:
    """The cells of the grid that have all their runs.

    Args:
        plan: of the comparison.
        outcomes: of runs.
        worst: value that a failed run counts as.
    """
    found = []
    for arm in plan.arms:
        for rate in plan.learning_rates:
            for ratio in plan.ratios(arm):
                runs = [Run("selection", arm.name, rate, ratio, seed) for seed in range(plan.seeds)]
                if all(run in outcomes for run in runs):
                    found.append(_cell(runs, outcomes, worst))
    return found


def _cell(runs: Sequence[Run], outcomes: Outcomes, worst: float) -> Cell:
    own = [outcomes[run] for run in runs]
    losses = tuple(outcome.final_loss for outcome in own if outcome.final_loss is not None)
    values = {run.seed: outcomes[run].value_or(worst) for run in runs}
    first = runs[0]
    failed = sum(outcome.error is not None for outcome in own)
    return Cell(first.arm, first.learning_rate, first.warmup_ratio, values, losses, failed)


def choose(found: Iterable[Cell], metric: Metric) -> list[Choice]:
    """For each arm the settings with the best mean value, the lower learning rate and shorter warmup of equals."""
    best: dict[str, Cell] = {}
    for cell in sorted(found, key=lambda cell: (cell.learning_rate, cell.warmup_ratio)):
        if cell.arm not in best or metric.gain(cell.value, best[cell.arm].value) > 0:
            best[cell.arm] = cell
    order = list(dict.fromkeys(cell.arm for cell in found))
    return [Choice(name, best[name].learning_rate, best[name].warmup_ratio, best[name].value) for name in order]


def at_best_length(found: Iterable[Cell], arm: str, rate: float, metric: Metric) -> Cell | None:
    """The cell of an arm at a learning rate, at the length of warmup that is best there."""
    own = [cell for cell in found if cell.arm == arm and cell.learning_rate == rate]
    return max(own, key=lambda cell: metric.merit(cell.value), default=None)


@dataclasses.dataclass(frozen=True)
class Stability:
    """How high a learning rate an arm bears.

    A rate is too high where a run fails, or the mean value is farther from the best of the arm than the plateau of the
    metric.

    Attributes:
        up_to: the last learning rate, counted upwards from the best one, before the first that is too high; None where
            every rate has a run that failed.
        fails_from: that first one; None where none that was tried is too high.
    """

    up_to: float | None
    fails_from: float | None


def stability(found: Sequence[Cell], arm: str, metric: Metric) -> Stability:
    """How high a learning rate an arm bears, warmup at the length that is best at each."""
    rates = sorted({cell.learning_rate for cell in found if cell.arm == arm})
    own = [cell for rate in rates if (cell := at_best_length(found, arm, rate, metric)) is not None]
    whole = [cell for cell in own if not cell.failed]
    if not whole:
        return Stability(None, rates[0] if rates else None)
    best = max(whole, key=lambda cell: metric.merit(cell.value))
    up_to = best.learning_rate
    for cell in own:
        if cell.learning_rate <= best.learning_rate:
            continue
        if cell.failed or metric.gain(best.value, cell.value) > metric.plateau:
            return Stability(up_to, cell.learning_rate)
        up_to = cell.learning_rate
    return Stability(up_to, None)


@dataclasses.dataclass(frozen=True)
class Gain:
    """What warmup gains over no warmup at one learning rate.

    Attributes:
        learning_rate: of both.
        warmup_ratio: length of warmup.
        gain: by the metric, paired by seed.
    """

    learning_rate: float
    warmup_ratio: float
    gain: Interval


def warmup_gains(found: Sequence[Cell], metric: Metric) -> list[Gain]:
    """What warmup at its best length gains over no warmup, by learning rate, on the seeds that it was chosen by."""
    gains = []
    for rate in sorted({cell.learning_rate for cell in found}):
        warm, cold = (at_best_length(found, name, rate, metric) for name in (WARMUP, NO_WARMUP))
        if warm is not None and cold is not None:
            gain = paired_gain(metric, list(warm.values.values()), list(cold.values.values()))
            gains.append(Gain(rate, warm.warmup_ratio, gain))
    return gains


def largest_gain(gains: Iterable[Gain]) -> Gain | None:
    """The learning rate at which warmup gained most; None where there is nothing to choose from."""
    return max(gains, key=lambda gain: gain.gain.mean, default=None)


def tested_gain(plan: Plan, gains: Iterable[Gain], outcomes: Outcomes, metric: Metric, worst: float) -> Gain | None:
    """The largest gain, measured on fresh seeds, which it was not chosen by; None while runs are missing."""
    most = largest_gain(gains)
    runs = [] if most is None else plan.gain_runs(most.learning_rate, most.warmup_ratio)
    if most is None or not runs or any(run not in outcomes for run in runs):
        return None
    warm, cold = ([outcomes[run].value_or(worst) for run in runs if run.arm == arm] for arm in (WARMUP, NO_WARMUP))
    return dataclasses.replace(most, gain=paired_gain(metric, warm, cold))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """An arm held against warmup, each at its chosen settings, on fresh seeds.

    Attributes:
        arm: name.
        choice: its settings.
        value: mean over the fresh seeds.
        difference: gain over warmup, paired, corrected for the number of arms.
        word: "beats" where the interval is above 0, "matches" where it is above minus the margin of the metric, "worse"
            where it is below that, else "undecided".
    """

    arm: str
    choice: Choice
    value: Interval
    difference: Interval
    word: Word


def judge(difference: Interval, margin: float) -> Word:
    """The word for a paired gain over warmup."""
    if difference.low > 0:
        return "beats"
    if difference.low > -margin:
        return "matches"
    return "worse" if difference.high < -margin else "undecided"


def verdicts(plan: Plan, chosen: Sequence[Choice], outcomes: Outcomes, metric: Metric, worst: float) -> list[Verdict]:
    """Every arm held against warmup; empty while runs are missing."""
    by_arm = _fresh_values(plan, chosen, outcomes, worst)
    if not by_arm:
        return []
    samples = {arm: paired_gain(metric, own, by_arm[WARMUP]).values for arm, own in by_arm.items()}
    itself = {WARMUP: interval(samples.pop(WARMUP))}
    differences = {**itself, **corrected(samples)}
    values = {arm: interval(own) for arm, own in by_arm.items()}
    words = {arm: judge(difference, metric.margin) for arm, difference in differences.items()}
    return [
        Verdict(choice.arm, choice, values[choice.arm], differences[choice.arm], words[choice.arm]) for choice in chosen
    ]


@dataclasses.dataclass(frozen=True)
class Share:
    """What an initialisation adds: an arm held against the same training without it, each at its chosen settings.

    Attributes:
        arm: name.
        without: name of the arm that differs from it in the initialisation only.
        difference: gain by the initialisation, paired over the fresh seeds, corrected for the number of arms with one.
    """

    arm: str
    without: str
    difference: Interval


def shares(plan: Plan, chosen: Sequence[Choice], outcomes: Outcomes, metric: Metric, worst: float) -> list[Share]:
    """What each initialisation adds, where the plan has an arm without it; empty while runs are missing."""
    by_arm = _fresh_values(plan, chosen, outcomes, worst)
    found = {}
    for arm in plan.arms if by_arm else ():
        without = next((other.name for other in plan.arms if _is_without_initialisation(other, arm)), None)
        if without is not None:
            found[arm.name, without] = paired_gain(metric, by_arm[arm.name], by_arm[without]).values
    return [Share(*names, difference) for names, difference in corrected(found).items()]


def _is_without_initialisation(other: Arm, arm: Arm) -> bool:
    """Whether an arm is another one without its initialisation."""
    if not arm.settings.get("nio") or other.settings.get("nio") or other.has_warmup != arm.has_warmup:
        return False
    own = {"nio", *(key for key in arm.settings if key.startswith("nio_"))} - {"nio_seed_optimizer"}
    rest = {key: value for key, value in arm.settings.items() if key not in own}
    return rest == {key: value for key, value in other.settings.items() if key not in own}


def _fresh_values(plan: Plan, chosen: Sequence[Choice], outcomes: Outcomes, worst: float) -> dict[str, list[float]]:
    """{arm: value on each fresh seed}; empty while runs are missing."""
    runs = plan.verdict_runs(chosen)
    by_arm: dict[str, list[float]] = {}
    for run in runs if all(run in outcomes for run in runs) else ():
        by_arm.setdefault(run.arm, []).append(outcomes[run].value_or(worst))
    return by_arm
