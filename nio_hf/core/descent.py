"""The gradient search: steps of Adam on the logarithms of the scales, on a few fixed batches.

Each iteration measures a candidate and its gradient. Where it keeps the bounds and its objective is the best so far it
is accepted, and the next candidate is one step of Adam from there. Where not, the step is halved and taken again from
the best point. A bound only refuses, it never drives a step. d(score)/d(log omega_k) is the sum over the tensors l of
group k of omega_k <W_l, sum_d (H_d v_d)_l>, see `curvature`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nio_hf.core.adam import AdamState, adam_step, moved
from nio_hf.core.bounds import Bounds
from nio_hf.core.config import NIOConfig
from nio_hf.core.curvature import Path, choose_path, second_pass
from nio_hf.core.problem import ScalingProblem, objective_of
from nio_hf.core.result import GradCosine, IterationRecord, Outcome, Reading
from nio_hf.core.sub_batches import SubBatches, measure
from nio_hf.core.tensors import ModelTensors
from nio_hf.errors import NumericsError

LEAST_STEP_SHARE = 1 / 32
"""Share of the rate below which a step is not halved again, and the search ends; our choice."""


@dataclasses.dataclass(frozen=True)
class DescentState:
    """A gradient search after some of its iterations, in numbers that JSON keeps exactly.

    Attributes:
        logs: (K,) log omega of the best point.
        best: the reading there; None before the start is measured.
        start: the reading at omega = 1; likewise.
        direction: (K,) of the step that leads from the best point to the candidate.
        share: of the rate, that the step has.
        adam: after the accepted steps.
        path: how products are computed; None before the first.
        history: one record for each iteration.
        micro_batch_size: samples computed at once.
    """

    logs: tuple[float, ...]
    best: Reading | None
    start: Reading | None
    direction: tuple[float, ...]
    share: float
    adam: AdamState
    path: Path | None
    history: tuple[IterationRecord, ...]
    micro_batch_size: int | None

    @property
    def scales(self) -> tuple[float, ...]:
        """(K,) scales of the best point, or 1 where it is not better than the start by more than its paired noise."""
        if self.best is None or self.start is None:
            return (1.0,) * len(self.logs)
        gain, error = self.best.gain_over(self.start)
        return tuple(math.exp(log) if gain > error else 1.0 for log in self.logs)


def init(problem: ScalingProblem) -> DescentState:
    """The state before the start is measured."""
    zeros = (0.0,) * len(problem.tensors.groups)
    adam = AdamState.zeros(len(zeros))
    return DescentState(zeros, None, None, zeros, 1.0, adam, None, (), problem.micro_batch_size)


def finished(problem: ScalingProblem, state: DescentState) -> bool:
    """Whether all iterations are done, or steps have become too small."""
    return len(state.history) >= problem.config.steps or state.share < LEAST_STEP_SHARE


def step(problem: ScalingProblem, parts: Sequence[SubBatches], state: DescentState) -> DescentState:
    """One iteration: measure the candidate and its gradient, accept it or halve the step."""
    config, path = problem.config, state.path
    if path is None:
        path = choose_path(config.curvature, problem.loss, problem.tensors, parts[0], state.micro_batch_size)
    logs = _moved(state, config)
    reading, gradient, size = _measure(problem, parts, [math.exp(log) for log in logs], path, state)
    outcome = _outcome(problem, state, reading)
    record = IterationRecord(
        iteration=len(state.history) + 1,
        tried=describe(problem, state),
        outcome=outcome,
        **({"loss": math.nan} if reading is None else reading.for_record(config.judged_by)),
        cost=path.steps * len(parts),
        micro_batch_size=size,
    )
    state = dataclasses.replace(state, path=path, history=(*state.history, record), micro_batch_size=size)
    if outcome not in ("start", "accepted") or reading is None:
        return dataclasses.replace(state, share=state.share / 2)
    direction, adam = adam_step(state.adam, gradient, clip=None)
    return dataclasses.replace(
        state,
        logs=logs,
        best=reading,
        start=reading if state.start is None else state.start,
        direction=tuple(direction.tolist()),
        adam=adam,
    )


def describe(problem: ScalingProblem, state: DescentState) -> str:
    """What the next iteration tries."""
    return "start" if state.best is None else f"a step of {problem.config.rate * state.share:.3g}"


def most_cost(config: NIOConfig) -> float:
    """Training steps that the search may take, where nothing is kept between the passes."""
    return 4.0 * config.search_batches * config.steps


def group_gradient(tensors: ModelTensors, by_tensor: Tensor) -> Tensor:
    """(K,) sums over the tensors of each group, of values (m,) of the tensors."""
    return torch.stack([by_tensor[list(members)].sum() for members in tensors.groups.values()])


def _outcome(problem: ScalingProblem, state: DescentState, reading: Reading | None) -> Outcome:
    if reading is None:
        return "loss_bound"
    if state.best is None or state.start is None:
        return "start"
    broken = Bounds.of(problem.config, state.start, state.start).broken_by(reading)
    return broken or ("accepted" if reading.score > state.best.score else "worse")


def _moved(state: DescentState, config: NIOConfig) -> tuple[float, ...]:
    """(K,) log omega of the candidate."""
    least, largest = map(math.log, config.scale_range)
    return moved(state.logs, (config.rate * state.share * step for step in state.direction), (least, largest))


def _measure(
    problem: ScalingProblem, parts: Sequence[SubBatches], by_group: Sequence[float], path: Path, state: DescentState
) -> tuple[Reading | None, Tensor, int | None]:
    """The reading at a point, (K,) gradient of -score by log omega, and the micro-batch size that it took.

    There is no reading where a loss or gradient is not finite, unless that is the start.
    """
    objective, size = objective_of(problem), state.micro_batch_size
    problem.place(by_group)
    total = torch.zeros(len(problem.initial), dtype=torch.float64)
    measured: list[GradCosine] = []
    scores: list[float] = []
    try:
        for part in parts:
            first, one, score = measure(
                problem.loss,
                problem.tensors,
                part,
                problem.collective,
                micro_batch_size=size,
                objective=objective,
                keep=path.keep,
            )
            gradient, size = second_pass(
                problem.loss, problem.tensors, part, first, objective, problem.initial, path, problem.collective
            )
            total += gradient.double().cpu() / len(parts)
            measured.append(one)
            scores.append(score)
    except NumericsError:
        if state.best is None:
            raise
        return None, total, size
    scales = torch.tensor(by_group, dtype=torch.float64)
    return Reading(GradCosine.mean(measured), tuple(scores)), scales * group_gradient(problem.tensors, total), size
