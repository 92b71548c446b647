"""GradInit: scales with which one step of the optimizer lowers the loss most.

Letters: S and S~ two parts of a batch that share half of their samples, g the gradient of L(S; theta), A[g] the
direction of the optimizer's first step, eta its size, p the norm of the optimizer, theta' = theta - eta A[g].

Source: Zhu, Ni, Xu, Kong, Huang, Goldstein, "GradInit: Learning to Initialize Neural Networks for Stable and Efficient
Training", NeurIPS 2021, arXiv 2102.08098, algorithm 1.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from nio_hf.baselines.options import check_options, is_positive
from nio_hf.baselines.tensors import gradient_over
from nio_hf.core import Collective, InitResult, NIOConfig, Resumption
from nio_hf.core.batches import batch_size, take, to_device
from nio_hf.core.curvature import CurvaturePath, make_path
from nio_hf.core.differentiator import LossFn
from nio_hf.core.gradcosine import dots, norm
from nio_hf.core.loop import Loop, Measured, iteration_seed
from nio_hf.core.method import SINGLE_PROCESS, Learned, OnIteration, Workspace, absolute_gamma, run_method
from nio_hf.core.two_pass import Reading, SubBatches, located
from nio_hf.errors import NumericsError, Problem

OptimizerName = Literal["adam", "sgd"]
DEFAULTS = NIOConfig(iterations=100, lr=0.01)
"""Settings where none are given; our choice."""
STEP_SIZES: dict[str, float] = {"adam": 1e-3, "sgd": 0.1}
"""{optimizer: eta where none is given}."""


def gradinit(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    config: NIOConfig | None = None,
    *,
    holdout: Sequence[Any] | None = None,
    on_iteration: OnIteration | None = None,
    collective: Collective = SINGLE_PROCESS,
    optimizer: OptimizerName = "adam",
    step_size: float | None = None,
) -> InitResult:
    """Learn a scale per tensor with which one optimizer step on S lowers the loss on S~.

        while ||g||_p > gamma   a step on omega that lowers ||g||_p
        otherwise               a step on omega that lowers L(S~; theta - eta A[g])

        optimizer   p   A[g]      dL(S~; theta')/domega_l, r = grad L(S~; theta')
        adam        1   sign(g)   <W_l, r_l>: the sign is constant
        sgd         2   g         <W_l, r_l - eta (H r)_l>, H the Hessian of L(S; theta)

    The gradient of ||g||_p is <W_l, (H v)_l> with v = sign(g) for p = 1 and g / ||g|| for p = 2. The step moves, and
    g is taken over, all tensors that are scaled and all gradient tensors of NIO, biases that are zero among them: what
    an optimizer would move, except zero tensors outside of linear, convolution and normalisation layers. The scales
    are learned by the same Adam on omega as NIO's, see [`ScaleAdam`].

    Every process computes the whole batch, and the numbers of rank 0 count.

    Args:
        model: as in [`initialize`], and likewise what follows.
        batches: see there. Of B samples, in an order drawn from `config.seed`, S are the first B - B/3 and S~ the
            last, rounded.
        loss_fn: see there.
        config: None for `DEFAULTS`. Of the shared settings, `overlap`, `objective` and `beta` are not used, and
            `sub_batches` only to measure. `gamma` is an absolute bound on ||g||_p; without it `gamma_relative` times
            ||g||_p of the first iteration is.
        holdout: see there.
        on_iteration: see there. A record has ||g||_p as `grad_norm`, L(S) as `loss` and, where that was lowered,
            L(S~; theta') as `objective`.
        collective: see there.
        optimizer: that the model will be trained with, "adam" or "sgd".
        step_size: eta; None for 0.001 with adam and 0.1 with sgd.

    Raises:
        ConfigError: lists the options that are out of range.
        NumericsError: for a loss or gradient that is not finite, before or after the step.
        NIOError: as in [`initialize`].
    """
    known = optimizer in STEP_SIZES
    eta = STEP_SIZES.get(optimizer, 1.0) if step_size is None else step_size
    check_options(
        "gradinit",
        ("optimizer", optimizer, known, f"Choose one of {', '.join(STEP_SIZES)}"),
        ("step_size", step_size, is_positive(eta), "Give a finite number above 0, or None"),
    )
    first_step: FirstStep = AdamStep() if optimizer == "adam" else SGDStep()

    def learn(workspace: Workspace) -> Learned:
        with gradient_over(workspace.scales, workspace.scales.trainable):
            loop = Loop(
                workspace.passes,
                workspace.scales,
                workspace.config,
                workspace.before,
                Resumption(every=None),
                workspace.started,
                name="GradInit",
            )
            steps = StepLoss(workspace, loop, first_step, eta)
            history = loop.run(steps, workspace.stream, workspace.initial, workspace.on_iteration)
        return Learned(loop.omega, history, steps.gamma, history[-1].curvature)

    return run_method(
        "gradinit",
        learn,
        model,
        batches,
        loss_fn,
        DEFAULTS if config is None else config,
        holdout=holdout,
        on_iteration=on_iteration,
        collective=collective,
        options={"optimizer": optimizer, "step_size": eta},
    )


class FirstStep(Protocol):
    """The first step of an optimizer on a gradient, given tensor by tensor."""

    @property
    def follows(self) -> bool:
        """Whether the direction changes with the gradient to first order."""

    def direction(self, gradient: list[Tensor]) -> list[Tensor]:
        """A[g]."""

    def norm(self, gradient: list[Tensor]) -> Tensor:
        """||g||_p."""

    def norm_cotangent(self, gradient: list[Tensor]) -> list[Tensor]:
        """Derivative of ||g||_p by g."""


class AdamStep:
    """Adam, whose first step is the sign of the gradient; p = 1."""

    follows = False

    def direction(self, gradient: list[Tensor]) -> list[Tensor]:
        """sign(g)."""
        return list(torch._foreach_sign(gradient))

    def norm(self, gradient: list[Tensor]) -> Tensor:
        """||g||_1."""
        return torch.stack(torch._foreach_norm(gradient, 1)).sum()

    def norm_cotangent(self, gradient: list[Tensor]) -> list[Tensor]:
        """sign(g)."""
        return self.direction(gradient)


class SGDStep:
    """Stochastic gradient descent; p = 2."""

    follows = True

    def direction(self, gradient: list[Tensor]) -> list[Tensor]:
        """The gradient itself."""
        return gradient

    def norm(self, gradient: list[Tensor]) -> Tensor:
        """||g||_2."""
        return norm(gradient)

    def norm_cotangent(self, gradient: list[Tensor]) -> list[Tensor]:
        """The unit gradient."""
        return list(torch._foreach_div(gradient, norm(gradient)))


class StepLoss:
    """One iteration of GradInit, where the gradient tensors are all that the step moves.

    Args:
        workspace: of the run.
        loop: that takes the steps.
        first_step: of the optimizer.
        step_size: eta.

    Attributes:
        gamma: absolute bound on ||g||_p, known from the first iteration on; None without one.
    """

    def __init__(self, workspace: Workspace, loop: Loop, first_step: FirstStep, step_size: float) -> None:
        self._workspace = workspace
        self._loop = loop
        self._first_step = first_step
        self._step_size = step_size
        self._path: CurvaturePath | None = None
        self.gamma = workspace.config.gamma

    def __call__(self, iteration: int, batch: Any, check_last: Callable[[float], None]) -> Measured:
        """As in [`ScaleMethod`]."""
        passes, where = self._workspace.passes, f"GradInit iteration {iteration}"
        seed = iteration_seed(self._workspace.config.seed, iteration)
        part, other = (to_device(half, passes.differentiator.device) for half in shared_halves(batch, seed))
        path = self._path_for(part)
        try:
            with passes.statistics(batch):
                with passes.collective.together(), located(where):
                    passes.differentiator.seed = 2 * seed
                    first = functools.partial(path.first, part)
                    gradient, loss = passes.back_off.run(first, part, where, path)
                    read = torch.stack([self._first_step.norm(gradient), loss, self._loop.last_gradient.abs().max()])
                passes.collective.broadcast_(read)
                grad_norm, loss_value, last = read.tolist()
                check_last(last)
                reading = Reading(0.0, grad_norm, (grad_norm,), (loss_value,))
                passes.check(reading, SubBatches(1, {0: part}, 2 * seed), where)
                if iteration == 1:
                    self.gamma = absolute_gamma(self._workspace.config, grad_norm)
                constrained = self.gamma is not None and grad_norm > self.gamma
                objective = None
                with passes.collective.together(), located(where):
                    if constrained:
                        del gradient
                        scale_gradient = self._by_curvature(path, part, self._first_step.norm_cotangent, where, seed)
                    else:
                        scale_gradient, objective = self._after_step(path, part, other, gradient, where, seed)
                passes.collective.broadcast_(scale_gradient)
        finally:
            path.reset()
        return Measured(
            scale_gradient=scale_gradient,
            branch="constraint" if constrained else "objective",
            grad_norm=grad_norm,
            loss=loss_value,
            objective=objective,
            curvature=path.name,
        )

    def _after_step(
        self, path: CurvaturePath, part: Any, other: Any, gradient: list[Tensor], where: str, seed: int
    ) -> tuple[Tensor, float]:
        """(m,) gradient of L(S~; theta') by omega, and that loss."""
        differentiator = self._workspace.differentiator
        moved, initial = differentiator.gradient_tensors, self._workspace.initial
        with _stepped(moved, self._first_step.direction(gradient), self._step_size):
            differentiator.seed = 2 * seed + 1
            compute = functools.partial(differentiator.dense_gradient, other, moved)
            residual, loss = self._workspace.passes.back_off.run(compute, other, where, path)
        value = float(loss)
        if not math.isfinite(value):
            raise NumericsError(Problem(where, f"the loss after the step is {value}", "Lower step_size"))
        # The scaled tensors come first among those that are moved.
        scale_gradient = dots(initial, residual[: len(initial)])
        if self._first_step.follows:
            by_direction = self._by_curvature(path, part, lambda _: residual, where, seed)
            scale_gradient.sub_(by_direction, alpha=self._step_size)
        return scale_gradient, value

    def _by_curvature(
        self,
        path: CurvaturePath,
        part: Any,
        cotangent: Callable[[list[Tensor]], list[Tensor]],
        where: str,
        seed: int,
    ) -> Tensor:
        """(m,) <W_l, (H v)_l> with H the Hessian of L(S; theta) and v the cotangent of g."""
        passes = self._workspace.passes
        passes.differentiator.seed = 2 * seed
        second = functools.partial(path.second, 0, part, cotangent)
        return dots(self._workspace.initial, passes.back_off.run(second, part, where, path))

    def _path_for(self, part: Any) -> CurvaturePath:
        if self._path is None:
            self._path = make_path(self._workspace.config.curvature, self._workspace.differentiator, part, 1)
        return self._path


def shared_halves(batch: Any, seed: int) -> tuple[Any, Any]:
    """S and S~ of a batch: without the last third of its samples and without the first, in an order drawn anew."""
    size = batch_size(batch)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    third = round(size / 3)
    return take(batch, order[: size - third]), take(batch, order[third:])


@contextlib.contextmanager
def _stepped(tensors: Sequence[nn.Parameter], direction: list[Tensor], size: float) -> Iterator[None]:
    """The tensors after a step against a direction, and back to what they were, bit for bit."""
    data = [tensor.data for tensor in tensors]
    saved = [tensor.clone() for tensor in data]
    try:
        torch._foreach_add_(data, direction, alpha=-size)
        yield
    finally:
        torch._foreach_copy_(data, saved)
