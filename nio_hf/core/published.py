"""The search of the paper: Adam on omega, a new batch for every step, and what the last step gives.

While GN of the batch exceeds gamma the step lowers GN, otherwise it raises the objective. There is no best point and no
bound but gamma.

Source: Yang et al., "Towards Theoretically Inspired Neural Initialization Optimization", NeurIPS 2022, algorithm 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nio_hf.core.adam import AdamState, Branch, adam_step, moved
from nio_hf.core.config import NIOConfig
from nio_hf.core.curvature import Path, choose_path, second_pass
from nio_hf.core.descent import group_gradient
from nio_hf.core.gradcosine import published_windows
from nio_hf.core.objectives import NormConstraint
from nio_hf.core.problem import ScalingProblem, objective_of, shuffled_parts
from nio_hf.core.result import IterationRecord
from nio_hf.core.sub_batches import measure

_LARGE = 1000
"""Samples of a sub-batch beside which truncation of its window is nothing."""


@dataclasses.dataclass(frozen=True)
class PublishedState:
    """The search of the paper after some of its iterations, in numbers that JSON keeps exactly.

    Attributes:
        scales: (K,) omega.
        adam: the moments of the steps so far.
        path: how products are computed; None before the first.
        history: one record for each iteration.
        micro_batch_size: samples computed at once.
    """

    scales: tuple[float, ...]
    adam: AdamState
    path: Path | None
    history: tuple[IterationRecord, ...]
    micro_batch_size: int | None


def init(problem: ScalingProblem) -> PublishedState:
    """The state at omega = 1."""
    groups = len(problem.tensors.groups)
    return PublishedState((1.0,) * groups, AdamState.zeros(groups), None, (), problem.micro_batch_size)


def finished(problem: ScalingProblem, state: PublishedState) -> bool:
    """Whether all iterations are done."""
    return len(state.history) >= problem.config.steps


def step(problem: ScalingProblem, batch: Any, state: PublishedState) -> PublishedState:
    """One iteration: measure a batch at the scales so far, and take a step of Adam on omega."""
    config, iteration = problem.config, len(state.history) + 1
    parts, path = shuffled_parts(problem, batch, iteration), state.path
    problem.place(state.scales)
    if path is None:
        path = choose_path(config.curvature, problem.loss, problem.tensors, parts, state.micro_batch_size)
    objective = objective_of(problem)
    first, measured, _ = measure(
        problem.loss,
        problem.tensors,
        parts,
        problem.collective,
        micro_batch_size=state.micro_batch_size,
        objective=objective,
        keep=path.keep,
    )
    constrained = config.gamma is not None and measured.grad_norm > config.gamma
    branch: Branch = "constraint" if constrained else "objective"
    lowered = NormConstraint() if constrained else objective
    by_tensor, size = second_pass(
        problem.loss, problem.tensors, parts, first, lowered, problem.initial, path, problem.collective
    )
    direction, adam = adam_step(state.adam, group_gradient(problem.tensors, by_tensor), branch)
    record = IterationRecord(
        iteration=iteration,
        tried=describe(problem, state),
        outcome="lower_norm" if constrained else "accepted",
        loss=measured.loss,
        grad_cosine=measured.value,
        grad_norm=measured.grad_norm,
        cost=path.steps * window_share(parts.batch_size, config),
        micro_batch_size=size,
    )
    return PublishedState(
        scales=moved(state.scales, (config.rate * direction).tolist(), config.scale_range),
        adam=adam,
        path=path,
        history=(*state.history, record),
        micro_batch_size=size,
    )


def describe(problem: ScalingProblem, state: PublishedState) -> str:
    """What the next iteration tries."""
    return f"a step of {problem.config.rate:g}"


def most_cost(config: NIOConfig) -> float:
    """Training steps that the search takes, where nothing is kept between the passes."""
    return 4.0 * window_share(_LARGE * config.sub_batches, config) * config.steps


def window_share(batch_size: int, config: NIOConfig) -> float:
    """Number of samples in the windows of a batch over its own: more than 1 where they overlap."""
    return sum(map(len, published_windows(batch_size, config.sub_batches, config.overlap))) / batch_size
