"""One iteration of NIO: GradCosine and gradient norm of a batch, and the gradient of the scales that follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from nio_hf.core.batches import batch_size
from nio_hf.core.config import CurvatureName
from nio_hf.core.curvature import CurvaturePath, make_path
from nio_hf.core.loop import Loop, Measured, iteration_seed
from nio_hf.core.method import Workspace
from nio_hf.core.objectives import NormConstraint, Objective, make_objective
from nio_hf.core.two_pass import Reading, SubBatches


class CosineSteps:
    """While GN exceeds gamma, the gradient of GN; otherwise that of the objective.

    Args:
        workspace: of the run.
        loop: that takes the steps.
        gamma: absolute bound on GN; None without one.
    """

    def __init__(self, workspace: Workspace, loop: Loop, gamma: float | None) -> None:
        self._workspace = workspace
        self._loop = loop
        self._gamma = gamma
        self._objective = make_objective(workspace.config, workspace.before.grad_norm)
        self._path: CurvaturePath | None = None

    def __call__(self, iteration: int, batch: Any, check_last: Callable[[float], None]) -> Measured:
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
