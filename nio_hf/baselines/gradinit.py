"""GradInit: scales with which one step of the optimizer lowers the loss most.

Letters: S and S~ two parts of a batch that share half of their samples, g the gradient of L(S; theta), A[g] the
direction of the optimizer's first step, eta its size, p the norm of the optimizer, theta' = theta - eta A[g].
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nio_hf.core.adam import AdamState, adam_step, moved
from nio_hf.core.batches import batch_size, take, to_device
from nio_hf.core.collective import Collective
from nio_hf.core.config import is_count, is_positive, is_range_around_one
from nio_hf.core.curvature import Path, choose_path, second_pass
from nio_hf.core.gradcosine import GradientSums, dots, norm
from nio_hf.core.method import Check, Learned, Method, Options, Watch
from nio_hf.core.problem import ScalingProblem, seed_of
from nio_hf.core.result import IterationRecord
from nio_hf.core.sub_batches import FirstPass, Keep, SubBatches, check, check_finite, first_pass, read
from nio_hf.core.tensors import copied_values, set_scales
from nio_hf.errors import NumericsError, Problem

OptimizerName = Literal["adam", "sgd"]

STEP_SIZES: dict[OptimizerName, float] = {"adam": 1e-3, "sgd": 0.1}
"""{optimizer: eta where none is given}."""
_MOST_STEPS: dict[OptimizerName, float] = {"adam": 4.0, "sgd": 5.0}
"""{optimizer: training steps of S or S~, two thirds of a batch, where nothing is kept between the passes}."""
_ALONE = Collective()


def learn_scales(problem: ScalingProblem, options: Options, watch: Watch) -> Learned:
    """Learn a scale per tensor with which one optimizer step on S lowers the loss on S~.

        while ||g||_p > gamma   a step on omega that lowers ||g||_p
        otherwise               a step on omega that lowers L(S~; theta - eta A[g])

        optimizer   p   A[g]      dL(S~; theta')/domega_l, r = grad L(S~; theta')
        adam        1   sign(g)   <W_l, r_l>: the sign is constant
        sgd         2   g         <W_l, r_l - eta (H r)_l>, H the Hessian of L(S; theta)

    The gradient of ||g||_p is <W_l, (H v)_l> with v = sign(g) for p = 1 and g / ||g|| for p = 2. The step moves, and
    g is taken over, all trainable tensors, those that are zero among them. The scales are learned by Adam on omega,
    see [`adam_step`]. Of B samples, in an order drawn from the seed, S are the first B - B/3 and S~ the last, rounded.
    A record has ||g||_p as `grad_norm`, L(S) as `loss` and, where that was lowered, L(S~; theta') as `objective`.

    Options:
        optimizer: Optimiser of the training, "adam" or "sgd".
        step_size: Eta; None for 0.001 with adam and 0.1 with sgd.
        gamma: Bound on ||g||_p; None for `gamma_relative`.
        gamma_relative: The bound as a multiple of ||g||_p of the first iteration; None for no bound.
        iterations: Steps on omega.
        lr: Learning rate of Adam on omega.
        scale_range: (least, largest) omega.

    Raises:
        NumericsError: A loss or gradient that is not finite, before or after the step.
        StoppedError: Where that was asked for.

    Source: Zhu, Ni, Xu, Kong, Huang, Goldstein, "GradInit: Learning to Initialize Neural Networks for Stable and
    Efficient Training", NeurIPS 2021, arXiv 2102.08098, algorithm 1. The defaults are our choice.
    """
    # The scaled tensors come first among those that the step moves.
    ordered = tuple(dict.fromkeys((*problem.tensors.scaled, *problem.tensors.trainable)))
    problem = dataclasses.replace(problem, tensors=dataclasses.replace(problem.tensors, gradient=ordered))
    ones = (1.0,) * len(problem.initial)
    state = GradInitState(ones, AdamState.zeros(len(ones)), None, None, problem.micro_batch_size)
    history: list[IterationRecord] = []
    exhausted = False
    for iteration in range(1, options["iterations"] + 1):
        started = time.perf_counter()
        batch = problem.stream.next()
        (exhausted,) = watch.stop_if_asked(problem.collective, batch is None)
        if exhausted:
            break
        watch.tries(_describe_step(options))
        # Every process takes the step by itself, on the whole batch, and what rank 0 found counts.
        with problem.collective.together():
            found = _step(problem, options, iteration, batch, state)
        state, record = problem.collective.broadcast_object(found)
        history.append(dataclasses.replace(record, seconds=time.perf_counter() - started))
        watch.sees(history[-1])
    set_scales(problem.tensors, problem.initial, state.scales)
    cost = math.fsum(record.cost for record in history)
    return Learned(
        state.scales, history=history, cost=cost, data_exhausted=exhausted, micro_batch_size=state.micro_batch_size
    )


def shared_halves(batch: Any, seed: int) -> tuple[Any, Any]:
    """S and S~ of a batch: without the last third of its samples and without the first, in an order drawn anew."""
    size = batch_size(batch)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    third = round(size / 3)
    return take(batch, order[: size - third]), take(batch, order[third:])


@dataclasses.dataclass(frozen=True)
class GradInitState:
    """GradInit after some of its iterations.

    Attributes:
        scales: (m,) omega.
        adam: Moments of the steps so far.
        gamma: Bound on ||g||_p; None before the first iteration.
        path: Way of computing products; None before the first one.
        micro_batch_size: Samples computed at once.
    """

    scales: tuple[float, ...]
    adam: AdamState
    gamma: float | None
    path: Path | None
    micro_batch_size: int | None


@dataclasses.dataclass(frozen=True)
class KnownSlope:
    """A function of the gradient g of S, by its slope at that gradient, tensor by tensor."""

    slope: list[Tensor]

    def cotangent(self, gradient: Sequence[Tensor], gradient_norm: Tensor, sums: GradientSums) -> list[Tensor]:
        """The slope."""
        return self.slope


def _step(
    problem: ScalingProblem, options: Options, iteration: int, batch: Any, state: GradInitState
) -> tuple[GradInitState, IterationRecord]:
    """One iteration: lower the norm of the gradient where it exceeds gamma, otherwise the loss after the step."""
    loss, tensors, initial = problem.loss, problem.tensors, problem.initial
    where, seed = f"GradInit iteration {iteration}", seed_of(problem.config.seed, iteration)
    part, other = (
        SubBatches(1, {0: to_device(half, loss.device)}, 2 * seed + number, batch_size(half), where)
        for number, half in enumerate(shared_halves(batch, seed))
    )
    set_scales(tensors, initial, state.scales)
    path, gamma = state.path, state.gamma
    first, gradient = _gradient(problem, part, state.micro_batch_size, None if path is None else path.keep)
    size, product_steps = first.micro_batch_size, 2.0 if first.kept else 3.0
    length, slope = _norm(gradient, options["optimizer"])
    measured, grad_norm = read(first.sums, part), float(length)
    check(measured, first, part, tensors, loss, _ALONE)
    if gamma is None:
        gamma = options["gamma"] or grad_norm * (options["gamma_relative"] or math.inf)
    constrained, objective = grad_norm > gamma, None
    by_scale = initial[0].new_zeros(len(initial))
    if not constrained:
        by_scale, slope, objective = _after_step(problem, options, other, gradient, size)
    if slope is not None:
        path = choose_path(problem.config.curvature, loss, tensors, part, size) if path is None else path
        by_curvature, size = second_pass(loss, tensors, part, first, KnownSlope(slope), initial, path, _ALONE)
        by_scale = by_scale + by_curvature
    check_finite(by_scale, tensors.scaled, "scale gradient", where, "Lower gradinit.lr or narrow gradinit.scale_range")
    direction, adam = adam_step(state.adam, by_scale, "constraint" if constrained else "objective")
    scales = moved(state.scales, (options["lr"] * direction).tolist(), options["scale_range"])
    steps = 1.0 + (0.0 if slope is None else product_steps) + (0.0 if constrained else 1.0)
    record = IterationRecord(
        iteration=iteration,
        tried=_describe_step(options),
        outcome="lower_norm" if constrained else "accepted",
        loss=measured.loss,
        grad_norm=grad_norm,
        objective=objective,
        cost=steps * part.batch_size / batch_size(batch),
        micro_batch_size=size,
    )
    return GradInitState(scales, adam, gamma, path, size), record


def _gradient(
    problem: ScalingProblem, part: SubBatches, micro_batch_size: int | None, keep: Keep = None
) -> tuple[FirstPass, list[Tensor]]:
    """Pass 1 over a part of a batch as one sub-batch, and the gradient of all that the step moves."""
    gradient: list[Tensor] = []
    wrt, size = problem.tensors.gradient_parameters, micro_batch_size
    first = first_pass(problem.loss, wrt, part, _ALONE, micro_batch_size=size, keep=keep, observe=gradient.extend)
    return first, gradient


def _norm(gradient: list[Tensor], optimizer: OptimizerName) -> tuple[Tensor, list[Tensor] | None]:
    """||g||_p, and its slope: the sign of the gradient, or the unit gradient."""
    if optimizer == "adam":
        return torch.stack(torch._foreach_norm(gradient, 1)).sum(), list(torch._foreach_sign(gradient))
    length = norm(gradient)
    return length, list(torch._foreach_div(gradient, length))


def _after_step(
    problem: ScalingProblem, options: Options, other: SubBatches, gradient: list[Tensor], micro_batch_size: int | None
) -> tuple[Tensor, list[Tensor] | None, float]:
    """(m,) <W_l, r_l>, the slope of L(S~; theta') by g where the direction follows it, and that loss.

    Raises:
        NumericsError: A loss that is not finite.
    """
    adam = options["optimizer"] == "adam"
    eta = options["step_size"] or STEP_SIZES[options["optimizer"]]
    with copied_values(problem.tensors):
        theta = [parameter.data for parameter in problem.tensors.gradient_parameters]
        torch._foreach_add_(theta, list(torch._foreach_sign(gradient)) if adam else gradient, alpha=-eta)
        first, residual = _gradient(problem, other, micro_batch_size)
    loss = float(first.sums.scalars[1, 0])
    if not math.isfinite(loss):
        raise NumericsError(Problem(other.where, f"the loss after the step is {loss}", "Lower gradinit.step_size"))
    by_scale = dots(problem.initial, residual[: len(problem.initial)])
    return by_scale, None if adam else list(torch._foreach_mul(residual, -eta)), loss


def _describe_step(options: Options) -> str:
    return f"a step of {options['lr']:g}"


def _checks(options: Options) -> Iterator[Check]:
    optimizer, iterations, scale_range = (options[name] for name in ("optimizer", "iterations", "scale_range"))
    positive = "Give a finite number above 0"
    yield "optimizer", optimizer, optimizer in list(STEP_SIZES), f"Choose one of {', '.join(STEP_SIZES)}"
    for name in ("step_size", "gamma", "gamma_relative"):
        value = options[name]
        yield name, value, value is None or is_positive(value), f"{positive}, or None"
    yield "iterations", iterations, is_count(iterations), "Give a whole number of at least 1"
    yield "lr", options["lr"], is_positive(options["lr"]), positive
    fix = "Give two numbers, 0 < first <= 1 <= second"
    yield "scale_range", scale_range, is_range_around_one(scale_range), fix


GRADINIT = Method(
    name="gradinit",
    title="GradInit",
    describe=lambda config: (
        "GradInit (Zhu et al., 2021) learned one scalar per weight tensor, so that the loss after one step of the "
        "optimizer is small."
    ),
    learn=learn_scales,
    batches=lambda config, options: options["iterations"],
    most_cost=lambda config, groups, options: options["iterations"] * _MOST_STEPS[options["optimizer"]] * 2 / 3,
    options={
        "optimizer": "adam",
        "step_size": None,
        "gamma": None,
        "gamma_relative": 2.0,
        "iterations": 100,
        "lr": 0.01,
        "scale_range": (0.01, 100.0),
    },
    check=_checks,
)
"""GradInit."""
