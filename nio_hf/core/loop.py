"""The iterations of a method that learns the scales omega (m,) by Adam on their gradient."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from nio_hf.core.config import NIOConfig
from nio_hf.core.optimizer import ScaleAdam
from nio_hf.core.result import Branch, GradCosine, IterationRecord
from nio_hf.core.scales import LayerScales
from nio_hf.core.state import NIOState, Resumption
from nio_hf.core.stream import BatchStream
from nio_hf.core.two_pass import TwoPass
from nio_hf.errors import Problem, StoppedError

_HELD_OUT = 500_000


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a method found on the batch of one iteration.

    Attributes:
        scale_gradient: (m,) gradient of the scales.
        branch: which of its two steps it takes.
        grad_norm, loss, grad_cosine, objective, curvature: as in [`IterationRecord`].
    """

    scale_gradient: Tensor
    branch: Branch
    grad_norm: float
    loss: float
    grad_cosine: float | None = None
    objective: float | None = None
    curvature: str = ""


class ScaleMethod(Protocol):
    """A method that learns scales from their gradient on a batch."""

    def __call__(self, iteration: int, batch: Any, check_last: Callable[[float], None]) -> Measured | None:
        """Measure a batch at the current scales; None to take no further step.

        Args:
            iteration: counted from 1.
            batch: of this iteration.
            check_last: to be called with the largest entry of the last scale gradient, once the host knows it.
        """


class Loop:
    """The iterations of a run, from the start or from the state of one that stopped.

    Args:
        passes: over the sub-batches.
        scales: names the tensors.
        config: settings.
        before: GradCosine before the first iteration.
        resumption: where to go on, and how to be stopped.
        started: `time.perf_counter()` at the start of the run.
        name: of the method, for messages.

    Attributes:
        omega: (m,) scales so far.
        last_gradient: (m,) gradient of the scales in the last iteration.
        history: one record per iteration so far.
    """

    def __init__(
        self,
        passes: TwoPass,
        scales: LayerScales,
        config: NIOConfig,
        before: GradCosine,
        resumption: Resumption,
        started: float,
        name: str = "NIO",
    ) -> None:
        scaled = scales.scaled
        self.omega = torch.ones(len(scaled), dtype=scaled[0].dtype, device=scaled[0].device)
        self._passes = passes
        self._scales = scales
        self._config = config
        self._before = before
        self._resumption = resumption
        self._optimizer = ScaleAdam(self.omega, config)
        self._sharing = scales.sharing(config.scale_sharing).to(self.omega.device)
        self.last_gradient = torch.zeros_like(self.omega)
        self.history: list[IterationRecord] = []
        self._started = started
        self._name = name
        self._saved = 0
        if resumption.state is not None:
            self._go_on_from(resumption.state)

    def seconds(self) -> float:
        """Wall time so far, that of the run before included."""
        return time.perf_counter() - self._started

    def run(
        self,
        method: ScaleMethod,
        stream: BatchStream,
        initial: list[Tensor],
        on_iteration: Callable[[IterationRecord], None] | None,
    ) -> list[IterationRecord]:
        """All iterations, or as many as there is data for and the method takes.

        Args:
            method: gives the gradient of the scales.
            stream: of batches.
            initial: the m tensors W_l.
            on_iteration: called with the record of each iteration.

        Raises:
            StoppedError: where that was asked for, after the state is saved.
        """
        theta = [parameter.data for parameter in self._scales.scaled]
        scale_by(self.omega, initial, theta)
        for _ in self.history:
            stream.next()
        for iteration in range(len(self.history) + 1, self._config.iterations + 1):
            started = time.perf_counter()
            batch = stream.next()
            ended, stopped = self._passes.collective.any(batch is None, self._resumption.should_stop())
            if ended:
                break
            if stopped:
                self._stop()
            measured = method(iteration, batch, functools.partial(self._check_last_gradient, iteration - 1))
            if measured is None:
                break
            self.last_gradient = measured.scale_gradient
            self._optimizer.step(self._shared(measured.scale_gradient), measured.branch)
            scale_by(self.omega, initial, theta)
            record = IterationRecord(
                iteration=iteration,
                grad_cosine=measured.grad_cosine,
                grad_norm=measured.grad_norm,
                loss=measured.loss,
                branch=measured.branch,
                seconds=time.perf_counter() - started,
                curvature=measured.curvature,
                micro_batch_size=self._passes.differentiator.micro_batch_size,
                objective=measured.objective,
            )
            self.history.append(record)
            if on_iteration is not None:
                on_iteration(record)
            if self._resumption.every is not None and iteration % self._resumption.every == 0:
                self._save()
        self._check_last_gradient(len(self.history), float(self.last_gradient.abs().max()))
        if self._resumption.every is not None:
            self._save()
        return self.history

    def _shared(self, gradient: Tensor) -> Tensor:
        """The gradient of the scales that tensors share: the sum over those that share one."""
        if self._config.scale_sharing == "tensor":
            return gradient
        return torch.zeros_like(gradient).index_add_(0, self._sharing, gradient)[self._sharing]

    def _go_on_from(self, state: NIOState) -> None:
        self.omega.copy_(self.omega.new_tensor(state.omega))
        self._optimizer.load(state.optimizer)
        self.history = list(state.history)
        self._started -= state.seconds
        self._saved = len(self.history)

    def _save(self) -> None:
        """Have the state saved, unless it is saved already."""
        if self._saved < len(self.history):
            self._check_last_gradient(len(self.history), float(self.last_gradient.abs().max()))
            self._resumption.save(
                NIOState(
                    omega=tuple(self.omega.tolist()),
                    optimizer=self._optimizer.state(),
                    before=self._before,
                    history=tuple(self.history),
                    seconds=self.seconds(),
                )
            )
            self._saved = len(self.history)

    def _stop(self) -> None:
        self._save()
        found = f"stopped after {len(self.history)} of {self._config.iterations} iterations, which are saved"
        raise StoppedError(Problem(self._name, found, "Start again to go on from there"))

    def _check_last_gradient(self, iteration: int, largest: float) -> None:
        """Refuse a scale gradient that is not finite; `largest` is its largest entry."""
        if not math.isfinite(largest):
            self._passes.check_scale_gradient(self.last_gradient, f"{self._name} iteration {iteration}")


def iteration_seed(seed: int, number: int) -> int:
    """Seed of what iteration `number` draws."""
    return (seed * 1_000_003 + number) % 2**40


def held_out_seed(seed: int, index: int) -> int:
    """Seed of what a measurement on held-out batch `index` draws."""
    return iteration_seed(seed, _HELD_OUT + index)


def scale_by(omega: Tensor, initial: list[Tensor], theta: list[Tensor]) -> None:
    """theta_l = omega_l W_l, in place."""
    torch._foreach_copy_(theta, torch._foreach_mul(initial, list(omega.unbind())))
