"""What follows from the runs of a comparison, with its uncertainty.

Letters: a an arm, w warmup at its best length, r a learning rate, s a seed, A accuracy in percent.

    difference   d_s = A(a, s) - A(w, s), each at its chosen settings, over n fresh seeds, with its 90% t interval,
                 Holm-corrected for the number of arms that are held against warmup
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from nio_hf.comparison.arms import NO_WARMUP, WARMUP
from nio_hf.comparison.plan import Choice, Plan
from nio_hf.trials.interval import Interval, corrected, interval, paired
from nio_hf.trials.results import Outcome
from nio_hf.trials.run import Arm, Run

MARGIN = 0.5
"""Points of accuracy that an arm may be behind warmup and still match it."""
PLATEAU = 3.0
"""Points of accuracy below the best of an arm at which a learning rate is too high for it."""
Word = Literal["beats", "matches", "undecided", "worse"]
Outcomes = Mapping[Run, Outcome]


@dataclasses.dataclass(frozen=True)
class Cell:
    """The runs of one arm at one learning rate and length of warmup, over the seeds of the selection.

    Attributes:
        arm: name.
        learning_rate: peak.
        warmup_ratio: length of warmup.
        accuracies: in percent, {seed: accuracy}; a run that failed counts as chance.
        losses: mean training loss of the last tenth of the steps, of the runs that did not fail.
        failed: number of runs that failed.
    """

    arm: str
    learning_rate: float
    warmup_ratio: float
    accuracies: Mapping[int, float]
    losses: tuple[float, ...]
    failed: int

    @property
    def accuracy(self) -> float:
        """Mean accuracy in percent."""
        return statistics.fmean(self.accuracies.values())

    @property
    def spread(self) -> float:
        """Standard deviation of the accuracy over the seeds; NaN for one seed."""
        values = list(self.accuracies.values())
        return statistics.stdev(values) if len(values) > 1 else math.nan

    @property
    def loss(self) -> float:
        """Mean of `losses`; NaN where every run failed."""
        return statistics.fmean(self.losses) if self.losses else math.nan


def cells(plan: Plan, outcomes: Outcomes, chance: float) -> list[Cell]:
    """The cells of the grid that have all their runs.

    Args:
        plan: of the comparison.
        outcomes: of runs.
        chance: accuracy of guessing, in percent, which a failed run counts as.
    """
    found = []
    for arm in plan.arms:
        for rate in plan.learning_rates:
            for ratio in plan.ratios(arm):
                runs = [Run("selection", arm.name, rate, ratio, seed) for seed in range(plan.seeds)]
                if all(run in outcomes for run in runs):
                    found.append(_cell(runs, outcomes, chance))
    return found


def _cell(runs: Sequence[Run], outcomes: Outcomes, chance: float) -> Cell:
    own = [outcomes[run] for run in runs]
    losses = tuple(outcome.final_loss for outcome in own if outcome.final_loss is not None)
    accuracies = {run.seed: outcomes[run].accuracy_or(chance) for run in runs}
    first = runs[0]
    failed = sum(outcome.error is not None for outcome in own)
    return Cell(first.arm, first.learning_rate, first.warmup_ratio, accuracies, losses, failed)


def choose(found: Iterable[Cell]) -> list[Choice]:
    """For each arm the settings with the best mean accuracy, the lower learning rate and shorter warmup of equals."""
    best: dict[str, Cell] = {}
    for cell in sorted(found, key=lambda cell: (cell.learning_rate, cell.warmup_ratio)):
        if cell.arm not in best or cell.accuracy > best[cell.arm].accuracy:
            best[cell.arm] = cell
    order = list(dict.fromkeys(cell.arm for cell in found))
    return [Choice(name, best[name].learning_rate, best[name].warmup_ratio, best[name].accuracy) for name in order]


def at_best_length(found: Iterable[Cell], arm: str, rate: float) -> Cell | None:
    """The cell of an arm at a learning rate, at the length of warmup that is best there."""
    own = [cell for cell in found if cell.arm == arm and cell.learning_rate == rate]
    return max(own, key=lambda cell: cell.accuracy, default=None)


@dataclasses.dataclass(frozen=True)
class Stability:
    """How high a learning rate an arm bears.

    A rate is too high where a run fails, or the mean accuracy is more than 3 points below the best of the arm.

    Attributes:
        up_to: the last learning rate, counted upwards from the best one, before the first that is too high; None where
            every rate has a run that failed.
        fails_from: that first one; None where none that was tried is too high.
    """

    up_to: float | None
    fails_from: float | None


def stability(found: Sequence[Cell], arm: str) -> Stability:
    """How high a learning rate an arm bears, warmup at the length that is best at each."""
    rates = sorted({cell.learning_rate for cell in found if cell.arm == arm})
    own = [cell for rate in rates if (cell := at_best_length(found, arm, rate)) is not None]
    whole = [cell for cell in own if not cell.failed]
    if not whole:
        return Stability(None, rates[0] if rates else None)
    best = max(whole, key=lambda cell: cell.accuracy)
    up_to = best.learning_rate
    for cell in own:
        if cell.learning_rate <= best.learning_rate:
            continue
        if cell.failed or cell.accuracy < best.accuracy - PLATEAU:
            return Stability(up_to, cell.learning_rate)
        up_to = cell.learning_rate
    return Stability(up_to, None)


@dataclasses.dataclass(frozen=True)
class Gain:
    """What warmup gains over no warmup at one learning rate.

    Attributes:
        learning_rate: of both.
        warmup_ratio: length of warmup.
        gain: points of accuracy, paired by seed.
    """

    learning_rate: float
    warmup_ratio: float
    gain: Interval


def warmup_gains(found: Sequence[Cell]) -> list[Gain]:
    """What warmup at its best length gains over no warmup, by learning rate, on the seeds that it was chosen by."""
    gains = []
    for rate in sorted({cell.learning_rate for cell in found}):
        warm, cold = (at_best_length(found, name, rate) for name in (WARMUP, NO_WARMUP))
        if warm is not None and cold is not None:
            difference = paired(list(warm.accuracies.values()), list(cold.accuracies.values()))
            gains.append(Gain(rate, warm.warmup_ratio, difference))
    return gains


def largest_gain(gains: Iterable[Gain]) -> Gain | None:
    """The learning rate at which warmup gained most; None where there is nothing to choose from."""
    return max(gains, key=lambda gain: gain.gain.mean, default=None)


def tested_gain(plan: Plan, gains: Iterable[Gain], outcomes: Outcomes, chance: float) -> Gain | None:
    """The largest gain, measured on fresh seeds, which it was not chosen by; None while runs are missing."""
    most = largest_gain(gains)
    runs = [] if most is None else plan.gain_runs(most.learning_rate, most.warmup_ratio)
    if most is None or not runs or any(run not in outcomes for run in runs):
        return None
    warm, cold = ([outcomes[run].accuracy_or(chance) for run in runs if run.arm == arm] for arm in (WARMUP, NO_WARMUP))
    return dataclasses.replace(most, gain=paired(warm, cold))


@dataclasses.dataclass(frozen=True)
class Verdict:
    """An arm held against warmup, each at its chosen settings, on fresh seeds.

    Attributes:
        arm: name.
        choice: its settings.
        accuracy: over the fresh seeds, in percent.
        difference: to warmup, in points, paired, corrected for the number of arms.
        word: "beats" where the interval is above 0, "matches" where it is above -0.5, "worse" where it is below -0.5,
            else "undecided".
    """

    arm: str
    choice: Choice
    accuracy: Interval
    difference: Interval
    word: Word


def judge(difference: Interval) -> Word:
    """The word for a paired difference to warmup."""
    if difference.low > 0:
        return "beats"
    if difference.low > -MARGIN:
        return "matches"
    return "worse" if difference.high < -MARGIN else "undecided"


def verdicts(plan: Plan, chosen: Sequence[Choice], outcomes: Outcomes, chance: float) -> list[Verdict]:
    """Every arm held against warmup; empty while runs are missing."""
    by_arm = _fresh_accuracies(plan, chosen, outcomes, chance)
    if not by_arm:
        return []
    samples = {arm: paired(own, by_arm[WARMUP]).values for arm, own in by_arm.items()}
    itself = {WARMUP: interval(samples.pop(WARMUP))}
    differences = {**itself, **corrected(samples)}
    return [
        Verdict(
            choice.arm, choice, interval(by_arm[choice.arm]), differences[choice.arm], judge(differences[choice.arm])
        )
        for choice in chosen
    ]


@dataclasses.dataclass(frozen=True)
class Share:
    """What an initialisation adds: an arm held against the same training without it, each at its chosen settings.

    Attributes:
        arm: name.
        without: name of the arm that differs from it in the initialisation only.
        difference: in points, paired over the fresh seeds, corrected for the number of arms with an initialisation.
    """

    arm: str
    without: str
    difference: Interval


def shares(plan: Plan, chosen: Sequence[Choice], outcomes: Outcomes, chance: float) -> list[Share]:
    """What each initialisation adds, where the plan has an arm without it; empty while runs are missing."""
    by_arm = _fresh_accuracies(plan, chosen, outcomes, chance)
    found = {}
    for arm in plan.arms if by_arm else ():
        without = next((other.name for other in plan.arms if _is_without_initialisation(other, arm)), None)
        if without is not None:
            found[arm.name, without] = paired(by_arm[arm.name], by_arm[without]).values
    return [Share(*names, difference) for names, difference in corrected(found).items()]


def _is_without_initialisation(other: Arm, arm: Arm) -> bool:
    """Whether an arm is another one without its initialisation."""
    if not arm.settings.get("nio") or other.settings.get("nio") or other.has_warmup != arm.has_warmup:
        return False
    own = {"nio", *(key for key in arm.settings if key.startswith("nio_"))} - {"nio_seed_optimizer"}
    rest = {key: value for key, value in arm.settings.items() if key not in own}
    return rest == {key: value for key, value in other.settings.items() if key not in own}


def _fresh_accuracies(
    plan: Plan, chosen: Sequence[Choice], outcomes: Outcomes, chance: float
) -> dict[str, list[float]]:
    """{arm: accuracy on each fresh seed}; empty while runs are missing."""
    runs = plan.verdict_runs(chosen)
    by_arm: dict[str, list[float]] = {}
    for run in runs if all(run in outcomes for run in runs) else ():
        by_arm.setdefault(run.arm, []).append(outcomes[run].accuracy_or(chance))
    return by_arm
