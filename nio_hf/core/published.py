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
from nio_hf.core.method import Learned, Options, Watch, stopped_error
from nio_hf.core.objectives import NormConstraint, make_objective
from nio_hf.core.problem import ScalingProblem, shuffled_parts
from nio_hf.core.records import restored
from nio_hf.core.result import GradCosine, IterationRecord
from nio_hf.core.sub_batches import measure

_LARGE = 1000
"""Samples of a sub-batch beside which truncation of its window is nothing."""


@dataclasses.dataclass(frozen=True)
class PublishedState:
    """The search of the paper after some of its iterations, in numbers that JSON keeps exactly.

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


@dataclasses.dataclass(frozen=True)
class NIOState:
    """A run of the search after some of its iterations, in numbers that JSON keeps exactly.

    Attributes:
        progress: Its state.
        before: GradCosine on the report batches at omega = 1.
        seconds: Wall time so far.
    """

    progress: PublishedState
    before: GradCosine
    seconds: float

    @property
    def iterations(self) -> int:
        """The iterations that it has behind it."""
        return len(self.progress.history)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> NIOState:
        """Inverse of `to_dict`, after a trip through JSON."""
        state: NIOState = restored(cls, fields)
        return state


def published_scales(problem: ScalingProblem, options: Options, watch: Watch) -> Learned:
    """All iterations, from the start or from where another run stopped.

    Raises:
        StoppedError: Where that was asked for, after the state is saved.
    """
    resumption, groups = watch.resumption, len(problem.tensors.groups)
    begun = resumption.state
    earlier = 0.0 if begun is None else begun.seconds
    zeros = AdamState.zeros(groups)
    state = (
        PublishedState((1.0,) * groups, zeros, None, (), problem.micro_batch_size) if begun is None else begun.progress
    )
    for _ in state.history:
        problem.stream.next()
    saved, exhausted = len(state.history), False

    def save() -> None:
        seconds = earlier + time.perf_counter() - watch.started
        resumption.save(NIOState(state, problem.before, seconds))

    while len(state.history) < problem.config.iterations:
        started = time.perf_counter()
        batch = problem.stream.next()
        exhausted, stopped = problem.collective.any(batch is None, resumption.should_stop())
        if exhausted:
            break
        if stopped:
            if saved < len(state.history):
                save()
            raise stopped_error(len(state.history))
        watch.tries(_describe(problem.config))
        state = step(problem, batch, state)
        timed = dataclasses.replace(state.history[-1], seconds=time.perf_counter() - started)
        state = dataclasses.replace(state, history=(*state.history[:-1], timed))
        watch.sees(timed)
        if resumption.every is not None and len(state.history) % resumption.every == 0:
            save()
            saved = len(state.history)
    if resumption.every is not None and saved < len(state.history):
        save()
    problem.place(state.scales)
    return Learned(
        omega=problem.tensors.by_tensor(state.scales),
        groups=problem.tensors.scales_of_groups(state.scales),
        history=state.history,
        cost=math.fsum(record.cost for record in state.history),
        data_exhausted=exhausted,
        seconds=earlier,
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
        cost=path.steps * window_share(parts.batch_size, config),
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
    """Training steps that the search takes, where nothing is kept between the passes."""
    return 4.0 * window_share(_LARGE * config.sub_batches, config) * config.iterations


def window_share(batch_size: int, config: NIOConfig) -> float:
    """Number of samples in the windows of a batch over its own: more than 1 where they overlap."""
    return sum(map(len, published_windows(batch_size, config.sub_batches, config.overlap))) / batch_size
