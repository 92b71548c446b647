"""MetaInit: norms of the weights at which the gradient changes least along itself."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nio_hf.baselines.composite_norms import CompositeNorms
from nio_hf.baselines.iterations import POSITIVE, describe_step, iterate, iteration_checks, move
from nio_hf.baselines.tensors import layer_weights
from nio_hf.core.batches import batch_size, to_device
from nio_hf.core.config import is_number, is_positive
from nio_hf.core.gradcosine import dots, norm
from nio_hf.core.loss import Loss, dense, graph_gradient
from nio_hf.core.memory import with_less_memory
from nio_hf.core.method import Check, Learned, Method, Options, Watch
from nio_hf.core.problem import ScalingProblem, seed_of
from nio_hf.core.result import IterationRecord
from nio_hf.core.sub_batches import check_finite, located
from nio_hf.core.tensors import set_scales
from nio_hf.errors import ConfigError, ModelError, NumericsError, Problem, one_line

Numbers = tuple[float, ...]

_COST = 9.0
"""Training steps of one iteration: to differentiate takes twice what it took to compute, and that three times."""


def learn_norms(problem: ScalingProblem, options: Options, watch: Watch) -> Learned:
    """Learn the norm of each weight so that the gradient quotient becomes small.

        GQ = (1/N) || (g - H g) / (g + eps_g) - 1 ||_1        eps_g = epsilon where g >= 0, else -epsilon

    with g (N,) the gradient of the mean loss over the weights of linear, convolution and attention layers, H its
    Hessian, and the fraction taken entry by entry; GQ is the mean of |H g / g| but for epsilon. Each weight keeps its
    direction, and its norm n_l takes steps of signSGD with momentum mu:

        d_l = dGQ/dn_l = <dGQ/dW_l, W_l> / ||W_l||        v_l <- mu v_l - lr sign(d_l)        n_l <- n_l + v_l

    Biases, normalisation layers and embeddings are left alone: the paper initialises biases with zero and learns the
    norms of weight matrices; what of a Transformer belongs to them is our reading. GQ is differentiated through g and
    through H g: that takes third derivatives, for which normalisation is computed in elementary operations (see
    [`CompositeNorms`]), and a graph over the whole batch, so activation checkpointing is off meanwhile. A record has
    ||g|| as `grad_norm` and GQ as `objective`.

    Options:
        momentum: mu in [0, 1).
        epsilon: above 0, in the units of the gradient.
        iterations: steps on the norms. The default is our choice.
        lr: in units of the norm of a weight; the paper has 0.1, for 500 iterations.
        scale_range: (least, largest) n_l over its first value.

    Raises:
        ConfigError: for micro-batches, which GQ is no mean over.
        ModelError: for an operation without third derivatives, or no layer with a weight.
        NumericsError: for a quotient or a derivative of it that is not finite.
        NIOMemoryError: where the graph does not fit into memory.

    Source: Dauphin and Schoenholz, "MetaInit: Initializing learning by learning to initialize", NeurIPS 2019.
    """
    if problem.config.micro_batch_size is not None:
        fix = "Leave it out and give smaller batches: MetaInit takes its quotient over a whole batch"
        raise ConfigError(Problem("NIOConfig.micro_batch_size", repr(problem.config.micro_batch_size), fix))
    places = tuple(layer_weights(problem.loss.model, problem.tensors))
    by_place = dict(zip(problem.tensors.scaled, problem.initial, strict=True))
    tensors = dataclasses.replace(problem.tensors, scaled=places)
    problem = dataclasses.replace(problem, tensors=tensors, initial=[by_place[place] for place in places])
    start = (1.0,) * len(places), (0.0,) * len(places)
    with _checkpointing_off(problem.loss.model):
        (scales, _), learned = iterate(problem, options, watch, start, functools.partial(_step, problem, options))
    set_scales(tensors, problem.initial, scales)
    return learned


def gradient_quotient(gradient: Sequence[Tensor], weights: Sequence[Tensor], epsilon: float) -> Tensor:
    """GQ of a gradient, given tensor by tensor with its graph; a scalar tensor with a graph of its own.

    Args:
        gradient: g, as `torch.autograd.grad(loss, weights, create_graph=True)` gives it.
        weights: what it was taken over.
        epsilon: keeps the denominator away from 0.
    """
    curved = [(g, g) for g in gradient if g.requires_grad]
    products = [torch.zeros_like(g) for g in gradient]
    if curved:
        outputs, vectors = zip(*curved, strict=True)
        found = torch.autograd.grad(outputs, weights, grad_outputs=vectors, create_graph=True, allow_unused=True)
        products = dense(found, weights)
    total = torch.stack(
        [
            ((g - product) / (g + torch.where(g >= 0, epsilon, -epsilon)) - 1).abs().sum()
            for g, product in zip(gradient, products, strict=True)
        ]
    ).sum()
    return total / sum(g.numel() for g in gradient)


def differentiate_quotient(
    loss: Loss, batch: Any, weights: Sequence[nn.Parameter], epsilon: float, *, seed: int, where: str
) -> tuple[Tensor, list[float]]:
    """dGQ/dn_l for each weight, on a batch, and GQ, ||g|| and the loss.

    Raises:
        ModelError: for an operation without third derivatives.
        NIOMemoryError: where the graph does not fit into memory.
    """

    def compute(size: int | None) -> tuple[Tensor, list[float]]:
        with CompositeNorms():
            gradient, mean = graph_gradient(loss, batch, weights, seed=seed)
            value = gradient_quotient(gradient, weights, epsilon)
            slopes: Sequence[Tensor | None] = [None] * len(weights)
            if value.requires_grad:
                slopes = torch.autograd.grad(value, weights, allow_unused=True)
        values = [weight.detach() for weight in weights]
        by_norm = dots(dense(slopes, values), values) / torch.stack(torch._foreach_norm(values))
        return by_norm, torch.stack([value.detach(), norm([g.detach() for g in gradient]), mean]).tolist()

    with located(where):
        try:
            return with_less_memory(compute, batch_size(batch), None, where=where, device=loss.device)[0]
        except RuntimeError as error:
            if "derivative for" not in str(error):
                raise
            fix = "Choose another method: MetaInit differentiates three times"
            raise ModelError(Problem(where, f"an operation has no derivative ({one_line(error)})", fix)) from error


def _step(
    problem: ScalingProblem, options: Options, iteration: int, batch: Any, state: tuple[Numbers, Numbers]
) -> tuple[tuple[Numbers, Numbers], IterationRecord]:
    """One iteration, from (n_l over its first value, v_l) to the next ones."""
    (scales, velocity), where = state, f"MetaInit iteration {iteration}"
    fix = "Check the initial weights, lower metainit.lr, or raise metainit.epsilon"
    set_scales(problem.tensors, problem.initial, scales)
    batch, seed = to_device(batch, problem.loss.device), seed_of(problem.config.seed, iteration)
    by_norm, (quotient, grad_norm, loss) = differentiate_quotient(
        problem.loss, batch, problem.tensors.scaled_parameters, options["epsilon"], seed=seed, where=where
    )
    if not math.isfinite(quotient):
        raise NumericsError(Problem(where, f"the gradient quotient is {quotient}", fix))
    check_finite(by_norm, problem.tensors.scaled, "derivative by the norm", where, fix)
    signs, lengths = by_norm.sign().tolist(), [float(tensor.norm()) for tensor in problem.initial]
    velocity = tuple(
        options["momentum"] * before - options["lr"] * sign for before, sign in zip(velocity, signs, strict=True)
    )
    scales = move(scales, (change / length for change, length in zip(velocity, lengths, strict=True)), options)
    record = IterationRecord(
        iteration=iteration,
        tried=describe_step(options),
        outcome="accepted",
        loss=loss,
        grad_norm=grad_norm,
        objective=quotient,
        cost=_COST,
    )
    return (scales, velocity), record


@contextlib.contextmanager
def _checkpointing_off(model: nn.Module) -> Iterator[None]:
    """Let the layers of transformers that checkpoint activations, which they do in training mode, keep them instead.

    What they compute anew in the backward pass would not go through [`CompositeNorms`].
    """
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    training = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = False
        yield
    finally:
        for layer, flag in zip(layers, training, strict=True):
            layer.training = flag


def _checks(options: Options) -> Iterator[Check]:
    momentum, epsilon = options["momentum"], options["epsilon"]
    yield "momentum", momentum, is_number(momentum) and 0 <= momentum < 1, "Give a number in [0, 1)"
    yield "epsilon", epsilon, is_positive(epsilon), f"{POSITIVE}, such as 1e-5"
    yield from iteration_checks(options)


METAINIT = Method(
    name="metainit",
    title="MetaInit",
    describe=lambda config: (
        "MetaInit (Dauphin and Schoenholz, 2019) learned the norm of each weight tensor, so that the gradient changes "
        "little along itself."
    ),
    learn=learn_norms,
    batches=lambda config, options: options["iterations"],
    most_cost=lambda config, groups, options: _COST * options["iterations"],
    options={"momentum": 0.9, "epsilon": 1e-5, "iterations": 100, "lr": 0.1, "scale_range": (0.01, 100.0)},
    check=_checks,
)
"""MetaInit."""
