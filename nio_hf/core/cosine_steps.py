"""One iteration of NIO: GradCosine and gradient norm of a batch, and the gradient of the scales that follows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import torch

from nio_hf.core.batches import batch_size
from nio_hf.core.config import CurvatureName
from nio_hf.core.curvature import CurvaturePath, make_path
from nio_hf.core.loop import Loop, Measured, iteration_seed, scale_by
from nio_hf.core.method import Workspace
from nio_hf.core.objectives import NormConstraint, Objective, make_objective
from nio_hf.core.two_pass import Reading, SubBatches


class CosineSteps:
    """While GN exceeds gamma, the gradient of GN; otherwise that of the objective; none once the loss has risen.

    Args:
        workspace: of the run.
        loop: that takes the steps.
        gamma: absolute bound on GN; None without one.

    Attributes:
        loss_rise: by what share the loss of a batch had risen when that ended the iterations; None where it did not.
    """

    def __init__(self, workspace: Workspace, loop: Loop, gamma: float | None) -> None:
        self._workspace = workspace
        self._loop = loop
        self._gamma = gamma
        self._objective = make_objective(workspace.config, workspace.before.grad_norm)
        self._path: CurvaturePath | None = None
        self.loss_rise: float | None = None

    def __call__(self, iteration: int, batch: Any, check_last: Callable[[float], None]) -> Measured | None:
        """As in [`ScaleMethod`]."""
        where, config, passes = f"NIO iteration {iteration}", self._workspace.config, self._workspace.passes
        seed = iteration_seed(config.seed, iteration)
        order = torch.randperm(batch_size(batch), generator=torch.Generator().manual_seed(seed))
        parts = passes.split(batch, config.sub_batches, overlap=config.overlap, order=order, seed=seed)
        path = self._path_for(parts)
        try:
            with passes.statistics(batch):
                needs_sum = self._objective.needs_gradient_sum
                sums = passes.first_pass(path, parts, where, with_gradient_sum=needs_sum)
                reading = Reading.of(sums, [self._loop.last_gradient.abs().max()])
                check_last(*reading.carried)
                passes.check(reading, parts, where)
                self.loss_rise = self._excessive_rise(batch, parts, reading.loss, where)
                if self.loss_rise is not None:
                    return None
                constrained = self._gamma is not None and reading.grad_norm > self._gamma
                objective: Objective = NormConstraint() if constrained else self._objective
                gradient = passes.second_pass(path, parts, sums, objective, self._workspace.initial, where)
        finally:
            path.reset()
        return Measured(
            scale_gradient=gradient,
            branch="constraint" if constrained else "objective",
            grad_norm=reading.grad_norm,
            loss=reading.loss,
            grad_cosine=reading.grad_cosine,
            curvature=path.name,
        )

    def _excessive_rise(self, batch: Any, parts: SubBatches, loss: float, where: str) -> float | None:
        """By what share the loss of a batch is above that of the same batch at omega = 1, where that is too much.

        The loss of the held-out batches tells whether to look: most iterations need not compute a loss for it.
        """
        most, workspace = self._workspace.config.max_loss_rise, self._workspace
        if most is None or not self._loop.history or _rise(loss, workspace.before.loss) <= most:
            return None
        try:
            scale_by(torch.ones_like(self._loop.omega), workspace.initial, workspace.theta)
            at_start = workspace.passes.mean_loss(batch, parts, f"{where}, at the start")
        finally:
            scale_by(self._loop.omega, workspace.initial, workspace.theta)
        rise = _rise(loss, at_start)
        return rise if rise > most else None

    def _path_for(self, parts: SubBatches) -> CurvaturePath:
        """The path of this run, chosen at the first iteration; a run that goes on keeps to the one it had."""
        if self._path is None:
            last = self._loop.history[-1] if self._loop.history else None
            differentiator = self._workspace.differentiator
            if last is not None and last.micro_batch_size is not None:
                differentiator.micro_batch_size = last.micro_batch_size
            name = self._workspace.config.curvature if last is None else last.curvature
            example = next(iter(parts.owned.values()), None)
            self._path = make_path(cast(CurvatureName, name), differentiator, example, len(parts.owned))
        return self._path


def _rise(loss: float, start: float) -> float:
    """By what share a loss is above another one."""
    return (loss - start) / max(abs(start), sys.float_info.min)
