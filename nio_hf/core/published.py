"""The search of the paper: Adam on omega, a new batch for every step, and what the last step gives.

While GN of the batch exceeds gamma the step lowers GN, otherwise it raises the objective. There is no best point and no
bound but gamma.

Source: Yang et al., "Towards Theoretically Inspired Neural Initialization Optimization", NeurIPS 2022, algorithm 1.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import torch
from torch import Tensor

from nio_hf.core.adam import AdamState, Branch, adam_step, moved
from nio_hf.core.config import NIOConfig
from nio_hf.core.curvature import Path, choose_path, second_pass
from nio_hf.core.gradcosine import published_windows
from nio_hf.core.method import Learned, Options, Watch
from nio_hf.core.objectives import NormConstraint, make_objective
from nio_hf.core.problem import ScalingProblem, shuffled_parts
from nio_hf.core.result import IterationRecord
from nio_hf.core.sub_batches import measure

_LARGE = 1000
"""Samples of a sub-batch beside which truncation of its window is nothing."""


@dataclasses.dataclass(frozen=True)
class PublishedState:
    """The search of the paper after some of its iterations.

    Attributes:
        scales: (K,) omega.
        adam: Moments of the steps so far.
        path: Way of computing products; None before the first one.
        history: One record for each iteration.
        micro_batch_size: Samples computed at once.
    """

    scales: tuple[float, ...]
    adam: AdamState
    path: Path | None
    history: tuple[IterationRecord, ...]
    micro_batch_size: int | None


def published_scales(problem: ScalingProblem, options: Options, watch: Watch) -> Learned:
    """Carry out all iterations.

    Raises:
        StoppedError: Where that was asked for.
    """
    groups, exhausted = len(problem.tensors.groups), False
    state = PublishedState((1.0,) * groups, AdamState.zeros(groups), None, (), problem.micro_batch_size)
    while len(state.history) < problem.config.iterations:
        started = time.perf_counter()
        batch = problem.stream.next()
        (exhausted,) = watch.stop_if_asked(problem.collective, batch is None)
        if exhausted:
            break
        watch.tries(_describe(problem.config))
        state = step(problem, batch, state)
        timed = dataclasses.replace(state.history[-1], seconds=time.perf_counter() - started)
        state = dataclasses.replace(state, history=(*state.history[:-1], timed))
        watch.sees(timed)
    problem.place(state.scales)
    return Learned(
        omega=problem.tensors.by_tensor(state.scales),
        groups=problem.tensors.scales_of_groups(state.scales),
        history=state.history,
        cost=math.fsum(record.cost for record in state.history),
        data_exhausted=exhausted,
        micro_batch_size=state.micro_batch_size,
    )


def step(problem: ScalingProblem, batch: Any, state: PublishedState) -> PublishedState:
    """One iteration: measure a batch at the scales so far, and take a step of Adam on omega."""
    config, iteration = problem.config, len(state.history) + 1
    parts, path = shuffled_parts(problem, batch, iteration), state.path
    problem.place(state.scales)
    if path is None:
        path = choose_path(config.curvature, problem.loss, problem.tensors, parts, state.micro_batch_size)
    first, measured = measure(
        problem.loss,
        problem.tensors,
        parts,
        problem.collective,
        micro_batch_size=state.micro_batch_size,
        keep=path.keep,
    )
    constrained = config.gamma is not None and measured.grad_norm > config.gamma
    branch: Branch = "constraint" if constrained else "objective"
    lowered = NormConstraint() if constrained else make_objective(config.objective)
    by_tensor, size = second_pass(
        problem.loss, problem.tensors, parts, first, lowered, problem.initial, path, problem.collective
    )
    direction, adam = adam_step(state.adam, _by_group(problem, by_tensor), branch)
    record = IterationRecord(
        iteration=iteration,
        tried=_describe(config),
        outcome="lower_norm" if constrained else "accepted",
        loss=measured.loss,
        grad_cosine=measured.value,
        grad_norm=measured.grad_norm,
        cost=_cost(path, parts.batch_size, config, size),
        micro_batch_size=size,
    )
    return PublishedState(
        scales=moved(state.scales, (config.lr * direction).tolist(), config.scale_range),
        adam=adam,
        path=path,
        history=(*state.history, record),
        micro_batch_size=size,
    )


def _describe(config: NIOConfig) -> str:
    return f"a step of {config.lr:g}"


def _by_group(problem: ScalingProblem, by_tensor: Tensor) -> Tensor:
    """(K,) sums over the tensors of each group, of values (m,) of the tensors."""
    return torch.stack([by_tensor[list(members)].sum() for members in problem.tensors.groups.values()])


def most_cost(config: NIOConfig) -> float:
    """Training steps that the search takes, where nothing is kept between the passes and memory does not run out."""
    path = Path("finite_difference" if config.curvature == "finite_difference" else "exact")
    return _cost(path, _LARGE * config.sub_batches, config, config.micro_batch_size) * config.iterations


def _cost(path: Path, batch_size: int, config: NIOConfig, micro_batch_size: int | None) -> float:
    """Training steps of one iteration, more where the windows of its batch overlap or are split."""
    windows = [len(window) for window in published_windows(batch_size, config.sub_batches, config.overlap)]
    in_parts = micro_batch_size is not None and micro_batch_size < max(windows)
    return path.steps(in_parts=in_parts) * sum(windows) / batch_size
