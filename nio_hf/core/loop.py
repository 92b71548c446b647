"""The iterations of NIO on the scales omega (m,)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from nio_hf.core.batches import batch_size
from nio_hf.core.config import CurvatureName, NIOConfig
from nio_hf.core.curvature import CurvaturePath, make_path
from nio_hf.core.objectives import NormConstraint, Objective, make_objective
from nio_hf.core.optimizer import ScaleAdam
from nio_hf.core.result import Branch, GradCosine, IterationRecord
from nio_hf.core.scales import LayerScales
from nio_hf.core.state import NIOState, Resumption
from nio_hf.core.stream import BatchStream
from nio_hf.core.two_pass import Reading, SubBatches, TwoPass
from nio_hf.errors import Problem, StoppedError

_HELD_OUT = 500_000


class Loop:
    """The iterations of a run, from the start or from the state of one that stopped.

    Args:
        passes: over the sub-batches.
        scales: names the tensors.
        config: settings.
        before: GradCosine before the first iteration.
        gamma: bound on GN; None without one.
        resumption: where to go on, and how to be stopped.
        started: `time.perf_counter()` at the start of the run.

    Attributes:
        omega: (m,) scales so far.
    """

    def __init__(
        self,
        passes: TwoPass,
        scales: LayerScales,
        config: NIOConfig,
        before: GradCosine,
        gamma: float | None,
        resumption: Resumption,
        started: float,
    ) -> None:
        scaled = scales.scaled
        self.omega = torch.ones(len(scaled), dtype=scaled[0].dtype, device=scaled[0].device)
        self._passes = passes
        self._scales = scales
        self._config = config
        self._before = before
        self._gamma = gamma
        self._resumption = resumption
        self._objective = make_objective(config, before.grad_norm)
        self._optimizer = ScaleAdam(self.omega, config)
        self._path: CurvaturePath | None = None
        self._last_gradient = torch.zeros_like(self.omega)
        self._history: list[IterationRecord] = []
        self._started = started
        self._saved = 0
        if resumption.state is not None:
            self._go_on_from(resumption.state)

    def seconds(self) -> float:
        """Wall time so far, that of the run before included."""
        return time.perf_counter() - self._started

    def run(
        self, stream: BatchStream, initial: list[Tensor], on_iteration: Callable[[IterationRecord], None] | None
    ) -> list[IterationRecord]:
        """All iterations, or as many as there is data for.

        Args:
            stream: of batches.
            initial: the m tensors W_l.
            on_iteration: called with the record of each iteration.

        Raises:
            StoppedError: where that was asked for, after the state is saved.
        """
        theta = [parameter.data for parameter in self._scales.scaled]
        _scale(theta, initial, self.omega)
        for _ in self._history:
            stream.next()
        for iteration in range(len(self._history) + 1, self._config.iterations + 1):
            started = time.perf_counter()
            batch = stream.next()
            ended, stopped = self._passes.collective.any(batch is None, self._resumption.should_stop())
            if ended:
                break
            if stopped:
                self._stop()
            branch, reading = self._step(iteration, batch, initial)
            _scale(theta, initial, self.omega)
            record = IterationRecord(
                iteration=iteration,
                grad_cosine=reading.grad_cosine,
                grad_norm=reading.grad_norm,
                loss=reading.loss,
                branch=branch,
                seconds=time.perf_counter() - started,
                curvature=self._path.name if self._path else "",
                micro_batch_size=self._passes.differentiator.micro_batch_size,
            )
            self._history.append(record)
            if on_iteration is not None:
                on_iteration(record)
            if self._resumption.every is not None and iteration % self._resumption.every == 0:
                self._save()
        self._check_last_gradient(len(self._history), float(self._last_gradient.abs().max()))
        if self._resumption.every is not None:
            self._save()
        return self._history

    def _step(self, iteration: int, batch: Any, initial: list[Tensor]) -> tuple[Branch, Reading]:
        where = f"NIO iteration {iteration}"
        seed = iteration_seed(self._config.seed, iteration)
        order = torch.randperm(batch_size(batch), generator=torch.Generator().manual_seed(seed))
        parts = self._passes.split(
            batch, self._config.sub_batches, overlap=self._config.overlap, order=order, seed=seed
        )
        path = self._path_for(parts)
        try:
            with self._passes.statistics(batch):
                needs_sum = self._objective.needs_gradient_sum
                sums = self._passes.first_pass(path, parts, where, with_gradient_sum=needs_sum)
                reading = Reading.of(sums, [self._last_gradient.abs().max()])
                self._check_last_gradient(iteration - 1, *reading.carried)
                self._passes.check(reading, parts, where)
                constrained = self._gamma is not None and reading.grad_norm > self._gamma
                objective: Objective = NormConstraint() if constrained else self._objective
                self._last_gradient = self._passes.second_pass(path, parts, sums, objective, initial, where)
        finally:
            path.reset()
        branch: Branch = "constraint" if constrained else "objective"
        self._optimizer.step(self._last_gradient, branch)
        return branch, reading

    def _path_for(self, parts: SubBatches) -> CurvaturePath:
        """The path of this run, chosen at the first iteration; a run that goes on keeps to the one it had."""
        if self._path is None:
            last = self._history[-1] if self._history else None
            if last is not None and last.micro_batch_size is not None:
                self._passes.differentiator.micro_batch_size = last.micro_batch_size
            name = self._config.curvature if last is None else last.curvature
            example = next(iter(parts.owned.values()), None)
            self._path = make_path(cast(CurvatureName, name), self._passes.differentiator, example, len(parts.owned))
        return self._path

    def _go_on_from(self, state: NIOState) -> None:
        self.omega.copy_(self.omega.new_tensor(state.omega))
        self._optimizer.load(state.optimizer)
        self._history = list(state.history)
        self._started -= state.seconds
        self._saved = len(self._history)

    def _save(self) -> None:
        """Have the state saved, unless it is saved already."""
        if self._saved < len(self._history):
            self._check_last_gradient(len(self._history), float(self._last_gradient.abs().max()))
            self._resumption.save(
                NIOState(
                    omega=tuple(self.omega.tolist()),
                    optimizer=self._optimizer.state(),
                    before=self._before,
                    history=tuple(self._history),
                    seconds=self.seconds(),
                )
            )
            self._saved = len(self._history)

    def _stop(self) -> None:
        self._save()
        found = f"stopped after {len(self._history)} of {self._config.iterations} iterations, which are saved"
        raise StoppedError(Problem("NIO", found, "Start again to go on from there"))

    def _check_last_gradient(self, iteration: int, largest: float) -> None:
        """Refuse a scale gradient that is not finite; `largest` is its largest entry."""
        if not math.isfinite(largest):
            self._passes.check_scale_gradient(self._last_gradient, f"NIO iteration {iteration}")


def iteration_seed(seed: int, number: int) -> int:
    """Seed of what iteration `number` draws."""
    return (seed * 1_000_003 + number) % 2**40


def held_out_seed(seed: int, index: int) -> int:
    """Seed of what a measurement on held-out batch `index` draws."""
    return iteration_seed(seed, _HELD_OUT + index)


def _scale(theta: list[Tensor], initial: list[Tensor], omega: Tensor) -> None:
    """theta_l = omega_l W_l, in place."""
    torch._foreach_copy_(theta, torch._foreach_mul(initial, list(omega.unbind())))
