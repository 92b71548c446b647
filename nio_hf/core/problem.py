"""The task of a method of initialisation, and measurements on the report batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nio_hf.core.batches import batch_size
from nio_hf.core.collective import Collective
from nio_hf.core.config import NIOConfig
from nio_hf.core.gradcosine import published_windows, sub_batch_windows
from nio_hf.core.loss import Loss
from nio_hf.core.result import GradCosine
from nio_hf.core.stream import BatchStream
from nio_hf.core.sub_batches import SubBatches, measure, split
from nio_hf.core.tensors import ModelTensors, set_scales

FORWARD_SHARE = 1 / 3
"""Arithmetic of a forward pass, in training steps."""
_REPORT = 500_000


@dataclasses.dataclass(frozen=True)
class ScalingProblem:
    """The task of a method, while the parameters of the model hold copies of their values.

    Attributes:
        config: Settings.
        loss: Loss of the model, which is in the state of [`mode.measuring`].
        tensors: Scaled tensors, their groups and the gradient tensors.
        initial: M scaled tensors W_l as they were.
        collective: Processes that share the work.
        stream: Stream of the batches that are not reported on.
        reported: The report batches.
        before: GradCosine on them.
        micro_batch_size: That measuring them took.
    """

    config: NIOConfig
    loss: Loss
    tensors: ModelTensors
    initial: Sequence[Tensor]
    collective: Collective
    stream: BatchStream
    reported: Sequence[Any]
    before: GradCosine
    micro_batch_size: int | None

    @property
    def theta(self) -> list[Tensor]:
        """The m scaled tensors as the model computes with them, to be written to."""
        return [parameter.data for parameter in self.tensors.scaled_parameters]

    def measure(self, micro_batch_size: int | None) -> tuple[GradCosine, int | None]:
        """[`measure_reports`] at the weights that the model has now."""
        return measure_reports(self.config, self.loss, self.tensors, self.collective, self.reported, micro_batch_size)

    def place(self, by_group: Sequence[float]) -> None:
        """Move the model to a point: theta_l = omega_k W_l with omega (K,) the scales of the groups."""
        set_scales(self.tensors, self.initial, self.tensors.by_tensor(by_group))


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


def measure_reports(
    config: NIOConfig,
    loss: Loss,
    tensors: ModelTensors,
    collective: Collective,
    batches: Sequence[Any],
    micro_batch_size: int | None,
    observe: Callable[[Sequence[Tensor]], None] | None = None,
) -> tuple[GradCosine, int | None]:
    """GC, GN and loss, means over the report batches, and the micro-batch size that it took.

    Each batch costs one training step of arithmetic. `observe` is called with each g_d of this process, tensor by
    tensor.

    Raises:
        NumericsError: A loss or gradient that is not finite, or zero.
    """
    measured: list[GradCosine] = []
    for number, batch in enumerate(batches):
        parts = report_parts(config, loss, collective, batch, number)
        first, one = measure(loss, tensors, parts, collective, micro_batch_size=micro_batch_size, observe=observe)
        micro_batch_size = first.micro_batch_size
        measured.append(one)
    return GradCosine.mean(measured), micro_batch_size


def seed_of(seed: int, number: int) -> int:
    """Seed of what iteration or batch `number` draws."""
    return (seed * 1_000_003 + number) % 2**40
