"""The scan: factors of one group after the other, judged by first gradients on a few fixed batches.

    common    omega = 2^x for all groups: the factor with which the layers keep the variance of their inputs, see
              `layers.preserving_factor`. With the objective "balance" additive tensors have a further factor, with
              which they are as large as what they are added to, see `balance.balancing_factor`. Where that breaks a
              bound, half of these exponents, a quarter, ...
    groups    with other objectives: one group at a time, its scale times 4, then 2, or divided by 4, then 2, for as
              long as the objective rises by more than its noise and the bounds are kept; group after group, until a
              round changes nothing or the budget is spent. The group with the most parameters, of "additive" that of
              all others, keeps the common factor.

Every candidate is measured on the same batches with the same random numbers, so that differences are paired.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from nio_hf.core.balance import BALANCING_COST, balancing_factor
from nio_hf.core.bounds import Bounds
from nio_hf.core.config import NIOConfig
from nio_hf.core.layers import preserving_factor
from nio_hf.core.problem import ScalingProblem, measure_point, objective_of
from nio_hf.core.result import IterationRecord, Outcome, Reading
from nio_hf.core.sub_batches import SubBatches
from nio_hf.errors import NumericsError

Stage = Literal["start", "common", "groups", "finished"]

LEAST_EXPONENT = 0.25
"""log2 of a common factor below which none is tried; our choice."""
GROUP_STEP, LAST_GROUP_STEP = 2.0, 1.0
"""Steps of log2 of the scale of a group, halved when one is refused; our choice."""
LEAST_GAIN = 0.01
"""Rise of the objective for a doubling or halving below which it does not count; our choice."""


@dataclasses.dataclass(frozen=True)
class ScanState:
    """A scan after some of its iterations, in numbers that JSON keeps exactly.

    Attributes:
        exponents: (K,) log2 of the accepted scales.
        readings: at omega = 1, at the common factor (which the norm band of the groups is relative to), and at the
            accepted scales; None before the start is measured.
        stage: what it is at.
        candidate: (K,) log2 of the scales that it tries next for all groups together.
        step: change of log2 of the scale of a group that it tries next.
        free: positions of the groups but the one that keeps the common factor.
        untried: those that are left in this round, the one that it tries next in front.
        moved: whether that one has moved in this direction already.
        changed: whether this round has changed a group.
        gains: (K,) rise of the objective by the accepted steps of each group alone.
        history: one record for each iteration.
        micro_batch_size: samples computed at once.
    """

    exponents: tuple[float, ...]
    readings: Readings | None
    stage: Stage
    candidate: tuple[float, ...]
    step: float
    free: tuple[int, ...]
    untried: tuple[int, ...]
    moved: bool
    changed: bool
    gains: tuple[float, ...]
    history: tuple[IterationRecord, ...]
    micro_batch_size: int | None

    @property
    def scales(self) -> tuple[float, ...]:
        """(K,) accepted scales."""
        return tuple(2.0**exponent for exponent in self.exponents)


@dataclasses.dataclass(frozen=True)
class Readings:
    """What the bounds and gains of a scan are relative to.

    Attributes:
        start: at omega = 1.
        common: at the common factor.
        current: at the accepted scales.
    """

    start: Reading
    common: Reading
    current: Reading


def init(problem: ScalingProblem) -> ScanState:
    """The state before the start is measured."""
    zeros = (0.0,) * len(problem.tensors.groups)
    return ScanState(
        exponents=zeros,
        readings=None,
        stage="start",
        candidate=(_preserving_exponent(problem),) * len(zeros),
        step=GROUP_STEP,
        free=_free_groups(problem),
        untried=(),
        moved=False,
        changed=False,
        gains=zeros,
        history=(),
        micro_batch_size=problem.micro_batch_size,
    )


def finished(problem: ScalingProblem, state: ScanState) -> bool:
    """Whether there is nothing left to try, or no budget for it."""
    if state.stage == "groups":
        spent = math.fsum(record.cost for record in state.history)
        return spent + problem.config.search_batches > problem.config.budget
    return state.stage == "finished"


def step(problem: ScalingProblem, parts: Sequence[SubBatches], state: ScanState) -> ScanState:
    """One iteration: try what comes next, and decide on it."""
    readings = state.readings
    if readings is None:
        state = _measure_start(problem, parts, state)
    elif state.stage == "groups":
        state = _try_group(problem, parts, state, readings)
    else:
        state = _try_common(problem, parts, state, readings)
    return _within_range(problem.config, state)


def describe(problem: ScalingProblem, state: ScanState) -> str:
    """What the next iteration tries, e.g. "positions x2"."""
    if state.stage == "start":
        return "start"
    if state.stage == "groups":
        group = state.untried[0]
        return f"{list(problem.tensors.groups)[group]} x{2.0 ** (state.exponents[group] + state.step):.3g}"
    scales = dict(zip(problem.tensors.groups, (f"x{2.0**exponent:.3g}" for exponent in state.candidate), strict=True))
    if len(set(scales.values())) == 1:
        return f"all {next(iter(scales.values()))}"
    return ", ".join(f"{group} {scale}" for group, scale in scales.items())


def most_cost(config: NIOConfig, groups: int) -> float:
    """Training steps that a scan may take, reports not counted: the budget, or what the common factor alone takes."""
    largest = math.log2(config.scale_range[1])
    candidates = 1 + math.floor(math.log2(largest / LEAST_EXPONENT)) if largest >= LEAST_EXPONENT else 0
    alone = float(config.search_batches * (1 + candidates))
    if config.judged_by == "balance":
        return alone + (BALANCING_COST if groups > 1 else 0.0)
    return alone if groups == 1 else max(alone, config.budget)


def _measure_start(problem: ScalingProblem, parts: Sequence[SubBatches], state: ScanState) -> ScanState:
    objective, ones = objective_of(problem), (1.0,) * len(state.exponents)
    start, size = measure_point(problem, parts, objective, ones, state.micro_batch_size)
    candidate, cost = _balanced(problem, parts, state.candidate, size)
    state = _recorded(state, _record(problem, state, "start", len(parts) + cost, size, start))
    state = dataclasses.replace(state, readings=Readings(start, start, start), stage="common", candidate=candidate)
    return state if max(candidate) >= LEAST_EXPONENT else _with_groups_next(state)


def _balanced(
    problem: ScalingProblem, parts: Sequence[SubBatches], candidate: tuple[float, ...], size: int | None
) -> tuple[tuple[float, ...], float]:
    """Exponents with which additive tensors are as large as what they are added to, and what it costs to find them."""
    config, groups = problem.config, list(problem.tensors.groups)
    if config.judged_by != "balance" or "additive" not in groups:
        return candidate, 0.0
    problem.place([2.0**exponent for exponent in candidate])
    additive = [problem.theta[place] for place in problem.tensors.groups["additive"]]
    factor = balancing_factor(problem.loss, additive, parts[0], problem.collective, size)
    position, exponents = groups.index("additive"), list(candidate)
    exponents[position] = math.log2(min(2.0 ** exponents[position] * factor, config.scale_range[1]))
    return tuple(exponents), BALANCING_COST


def _try_common(
    problem: ScalingProblem, parts: Sequence[SubBatches], state: ScanState, readings: Readings
) -> ScanState:
    """Measure scales of all groups; accept them, or take half of their exponents."""
    exponents = state.candidate
    bounds = Bounds.of(problem.config, readings.start)
    reading, outcome, size = _judge(problem, parts, state, [2.0**exponent for exponent in exponents], bounds)
    record = _record(problem, state, outcome, len(parts), size, reading, scale=2.0 ** exponents[_keeping(problem)])
    state = _recorded(state, record)
    if reading is not None and outcome == "accepted":
        accepted = Readings(readings.start, reading, reading)
        return _with_groups_next(dataclasses.replace(state, exponents=exponents, readings=accepted))
    halved = dataclasses.replace(state, candidate=tuple(exponent / 2 for exponent in exponents))
    return halved if max(halved.candidate) >= LEAST_EXPONENT else _with_groups_next(halved)


def _try_group(problem: ScalingProblem, parts: Sequence[SubBatches], state: ScanState, readings: Readings) -> ScanState:
    """Try a scale of the group in front; go on in its direction, turn round, or go on to the next group."""
    group = state.untried[0]
    exponents, gains = list(state.exponents), list(state.gains)
    exponents[group] += state.step
    bounds = Bounds.of(problem.config, readings.start, readings.common)
    reading, outcome, size = _judge(problem, parts, state, [2.0**exponent for exponent in exponents], bounds)
    if reading is not None and outcome == "accepted":
        outcome, gain = _weigh(state.step, reading, readings)
        gains[group] += gain
    name = list(problem.tensors.groups)[group]
    record = _record(problem, state, outcome, len(parts), size, reading, group=name, scale=2.0 ** exponents[group])
    state = _recorded(state, record)
    if reading is None or outcome != "accepted":
        return _turned(problem.config, state)
    moved = dataclasses.replace(
        state,
        exponents=tuple(exponents),
        gains=tuple(gains),
        readings=dataclasses.replace(readings, current=reading),
        moved=True,
        changed=True,
    )
    # Behind a halved step lies what was refused before.
    return moved if abs(state.step) == GROUP_STEP else _with_next_group(moved)


def _weigh(step: float, reading: Reading, readings: Readings) -> tuple[Outcome, float]:
    """Whether a step of a group within the bounds is worth it, and what the objective gains by it."""
    gain, error = reading.gain_over(readings.current)
    if not gain > LEAST_GAIN * abs(step):
        return "no_gain", gain
    return "accepted" if gain > error else "noise", gain


def _judge(
    problem: ScalingProblem, parts: Sequence[SubBatches], state: ScanState, by_group: Sequence[float], bounds: Bounds
) -> tuple[Reading | None, Outcome, int | None]:
    """Measure a point and hold it against the bounds; a loss or gradient that is not finite breaks that on the loss."""
    try:
        reading, size = measure_point(problem, parts, objective_of(problem), by_group, state.micro_batch_size)
    except NumericsError:
        return None, "loss_bound", state.micro_batch_size
    return reading, bounds.broken_by(reading) or "accepted", size


def _recorded(state: ScanState, record: IterationRecord) -> ScanState:
    return dataclasses.replace(state, history=(*state.history, record), micro_batch_size=record.micro_batch_size)


def _with_groups_next(state: ScanState) -> ScanState:
    """The state with the common factor settled."""
    if not state.free:
        return dataclasses.replace(state, stage="finished")
    return dataclasses.replace(state, stage="groups", step=GROUP_STEP, untried=state.free, moved=False, changed=False)


def _free_groups(problem: ScalingProblem) -> tuple[int, ...]:
    """Positions of the groups that are tried one after the other: none where they are balanced instead."""
    if problem.config.judged_by == "balance":
        return ()
    return tuple(position for position in range(len(problem.tensors.groups)) if position != _keeping(problem))


def _keeping(problem: ScalingProblem) -> int:
    """Position of the group that keeps the common factor: the one with the most parameters, or all but additive."""
    groups = problem.tensors.groups
    if problem.config.groups == "additive" and len(groups) > 1:
        return list(groups).index("others")
    sizes = [sum(problem.initial[member].numel() for member in members) for members in groups.values()]
    return sizes.index(max(sizes))


def _within_range(config: NIOConfig, state: ScanState) -> ScanState:
    """The state with the next trial of a group that stays within the range of the scales in front."""
    least, largest = config.scale_range
    while state.stage == "groups" and not least <= 2.0 ** (state.exponents[state.untried[0]] + state.step) <= largest:
        state = _turned(config, state)
    return state


def _turned(config: NIOConfig, state: ScanState) -> ScanState:
    """The state where a step is refused: a smaller one follows, the other direction, or the next group."""
    if abs(state.step) > LAST_GROUP_STEP:
        return dataclasses.replace(state, step=state.step / 2)
    if state.step > 0 and not state.moved:
        return dataclasses.replace(state, step=-GROUP_STEP)
    return _with_next_group(state)


def _with_next_group(state: ScanState) -> ScanState:
    """The state with the group in front settled for this round."""
    state = dataclasses.replace(state, untried=state.untried[1:], step=GROUP_STEP, moved=False)
    if state.untried:
        return state
    if not state.changed or len(state.free) == 1:
        return dataclasses.replace(state, stage="finished")
    return dataclasses.replace(state, untried=state.free, changed=False)


def _preserving_exponent(problem: ScalingProblem) -> float:
    """log2 of the common factor that keeps variances, from 0 to what the range of the scales allows."""
    factor = preserving_factor(problem.loss.model, problem.tensors)
    return max(0.0, math.log2(min(factor, problem.config.scale_range[1])))


def _record(
    problem: ScalingProblem,
    state: ScanState,
    outcome: Outcome,
    cost: float,
    micro_batch_size: int | None,
    reading: Reading | None = None,
    *,
    group: str | None = None,
    scale: float | None = None,
) -> IterationRecord:
    """The record of what the state was about to try."""
    return IterationRecord(
        iteration=len(state.history) + 1,
        tried=describe(problem, state),
        outcome=outcome,
        **({"loss": math.nan} if reading is None else reading.for_record(problem.config.judged_by)),
        group=group,
        scale=scale,
        cost=cost,
        micro_batch_size=micro_batch_size,
    )
