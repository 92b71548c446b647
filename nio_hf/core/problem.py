"""What a method of initialisation is given, and how a point is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from nio_hf.core.batches import batch_size
from nio_hf.core.collective import Collective
from nio_hf.core.config import NIOConfig
from nio_hf.core.gradcosine import published_windows, sub_batch_windows
from nio_hf.core.loss import Loss
from nio_hf.core.objectives import Objective, make_objective
from nio_hf.core.result import GradCosine, Reading
from nio_hf.core.stream import BatchStream
from nio_hf.core.sub_batches import SubBatches, measure, split
from nio_hf.core.tensors import ModelTensors, set_scales

FORWARD_SHARE = 1 / 3
"""Arithmetic of a forward pass, in training steps."""
_SEARCH, _REPORT = 600_000, 500_000


@dataclasses.dataclass(frozen=True)
class ScalingProblem:
    """What a method works with, while the parameters of the model hold copies of their values.

    Attributes:
        config: settings.
        loss: of the model, which is in the state of [`mode.measuring`].
        tensors: the scaled tensors, their groups and the gradient tensors.
        initial: the m scaled tensors W_l as they were.
        collective: the processes that share the work.
        stream: of the batches that are not reported on.
        before: GradCosine on the report batches.
        micro_batch_size: that measuring them took.
    """

    config: NIOConfig
    loss: Loss
    tensors: ModelTensors
    initial: Sequence[Tensor]
    collective: Collective
    stream: BatchStream
    before: GradCosine
    micro_batch_size: int | None

    @property
    def theta(self) -> list[Tensor]:
        """The m scaled tensors as the model computes with them, to be written to."""
        return [parameter.data for parameter in self.tensors.scaled_parameters]

    def place(self, by_group: Sequence[float]) -> None:
        """Move the model to a point: theta_l = omega_k W_l with omega (K,) the scales of the groups."""
        set_scales(self.tensors, self.initial, self.tensors.by_tensor(by_group))


def objective_of(problem: ScalingProblem) -> Objective:
    """The objective of the settings, whose GN_0 is that of the report batches at the start."""
    return make_objective(problem.config.judged_by, problem.config.sub_batches, problem.before.grad_norm)


def search_parts(problem: ScalingProblem, batches: Sequence[Any]) -> list[SubBatches]:
    """The sub-batches of the search batches that this process owns, in the order of their samples."""
    return [
        parts_of(problem.config, problem.loss, problem.collective, batch, f"search batch {number}", _SEARCH + number)
        for number, batch in enumerate(batches)
    ]


def report_parts(config: NIOConfig, loss: Loss, collective: Collective, batch: Any, number: int) -> SubBatches:
    """The sub-batches of a report batch that this process owns."""
    return parts_of(config, loss, collective, batch, f"report batch {number}", _REPORT + number)


def parts_of(config: NIOConfig, loss: Loss, collective: Collective, batch: Any, where: str, number: int) -> SubBatches:
    """The sub-batches of a batch that this process owns, in the order of its samples."""
    windows = sub_batch_windows(batch_size(batch), config.sub_batches)
    seed, size = seed_of(config.seed, number), config.micro_batch_size
    return split(batch, windows, loss, collective, where=where, seed=seed, micro_batch_size=size)


def shuffled_parts(problem: ScalingProblem, batch: Any, iteration: int) -> SubBatches:
    """The published windows of a batch whose samples are put in an order that is drawn for this iteration."""
    config, size = problem.config, batch_size(batch)
    seed = seed_of(config.seed, iteration)
    return split(
        batch,
        published_windows(size, config.sub_batches, config.overlap),
        problem.loss,
        problem.collective,
        where=f"iteration {iteration}",
        seed=seed,
        order=torch.randperm(size, generator=torch.Generator().manual_seed(seed)),
        micro_batch_size=config.micro_batch_size,
    )


def measure_point(
    problem: ScalingProblem,
    parts: Iterable[SubBatches],
    objective: Objective,
    by_group: Sequence[float],
    micro_batch_size: int | None,
) -> tuple[Reading, int | None]:
    """Measure the model at scales of the groups (K,), as [`measure_batches`]."""
    problem.place(by_group)
    return measure_batches(problem.loss, problem.tensors, parts, problem.collective, micro_batch_size, objective)


def measure_batches(
    loss: Loss,
    tensors: ModelTensors,
    parts: Iterable[SubBatches],
    collective: Collective,
    micro_batch_size: int | None,
    objective: Objective | None = None,
) -> tuple[Reading, int | None]:
    """GC, GN, loss and scores of several batches, at one training step of arithmetic each, and the micro-batch size.

    Raises:
        NumericsError: for a loss or gradient that is not finite, or zero.
    """
    measured: list[GradCosine] = []
    scores: list[float] = []
    for part in parts:
        first, one, score = measure(
            loss, tensors, part, collective, micro_batch_size=micro_batch_size, objective=objective
        )
        micro_batch_size = first.micro_batch_size
        measured.append(one)
        scores.append(score)
    return Reading(GradCosine.mean(measured), tuple(scores)), micro_batch_size


def seed_of(seed: int, number: int) -> int:
    """Seed of what iteration or batch `number` draws."""
    return (seed * 1_000_003 + number) % 2**40
