"""MetaInit: norms of the weights at which the gradient changes least along itself.

Source: Dauphin and Schoenholz, "MetaInit: Initializing learning by learning to initialize", NeurIPS 2019.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nio_hf.baselines.composite_norms import CompositeNorms
from nio_hf.baselines.options import check_options, is_number, is_positive
from nio_hf.baselines.tensors import gradient_over, layer_weights
from nio_hf.core import Collective, InitResult, IterationRecord, NIOConfig
from nio_hf.core.batches import to_device
from nio_hf.core.differentiator import LossFn, dense
from nio_hf.core.gradcosine import dots, norm
from nio_hf.core.loop import iteration_seed
from nio_hf.core.memory import is_out_of_memory
from nio_hf.core.method import SINGLE_PROCESS, Learned, OnIteration, Workspace, run_method
from nio_hf.errors import ConfigError, ModelError, NIOMemoryError, NumericsError, Problem, one_line

DEFAULTS = NIOConfig(iterations=100, lr=0.1)
"""Settings where none are given: the rate of the paper."""


def metainit(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    config: NIOConfig | None = None,
    *,
    holdout: Sequence[Any] | None = None,
    on_iteration: OnIteration | None = None,
    collective: Collective = SINGLE_PROCESS,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
) -> InitResult:
    """Learn the norm of each weight so that the gradient quotient becomes small.

        GQ = (1/N) || (g - H g) / (g + eps_g) - 1 ||_1        eps_g = epsilon where g >= 0, else -epsilon

    with g (N,) the gradient of the mean loss over the weights of linear, convolution and attention layers, H its
    Hessian, and the fraction taken entry by entry; GQ is the mean of |H g / g| but for epsilon. Each weight keeps its
    direction, and its norm n_l takes steps of signSGD with momentum mu:

        d_l = dGQ/dn_l = <dGQ/dW_l, W_l> / ||W_l||        v_l <- mu v_l - lr sign(d_l)        n_l <- n_l + v_l

    Biases, normalisation layers and embeddings are left alone: the paper initialises biases with zero and learns the
    norms of weight matrices; what of a Transformer belongs to them is our reading. GQ is differentiated through g and
    through H g: that takes third derivatives, for which normalisation is computed in elementary operations (see
    [`CompositeNorms`]), and a graph over the whole batch, so activation checkpointing is off meanwhile.

    Every process computes the whole batch, and the numbers of rank 0 count.

    Args:
        model: as in [`initialize`], and likewise what follows.
        batches: see there.
        loss_fn: see there.
        config: None for `DEFAULTS`. Of the shared settings, those of GradCosine and curvature are used to measure only.
            `lr` is in units of the norm of a weight (the paper has 0.1 for 500 iterations); `min_scale` and `max_scale`
            bound n_l over its first value.
        holdout: see there.
        on_iteration: see there. A record has ||g|| as `grad_norm` and GQ as `objective`.
        collective: see there.
        momentum: mu in [0, 1).
        epsilon: above 0, in the units of the gradient.

    Raises:
        ConfigError: lists the options that are out of range; micro-batches, which GQ is no mean over.
        ModelError: for an operation without third derivatives, or no layer with a weight.
        NumericsError: for a quotient or a derivative of it that is not finite.
        NIOMemoryError: where the graph does not fit into memory.
        NIOError: as in [`initialize`].
    """
    check_options(
        "metainit",
        ("momentum", momentum, is_number(momentum) and 0 <= momentum < 1, "Give a number in [0, 1)"),
        ("epsilon", epsilon, is_positive(epsilon), "Give a finite number above 0, such as 1e-5"),
    )
    if isinstance(config, NIOConfig) and config.micro_batch_size is not None:
        fix = "Leave it out and give smaller batches: MetaInit takes its quotient over a whole batch"
        raise ConfigError(Problem("NIOConfig.micro_batch_size", repr(config.micro_batch_size), fix))

    def learn(workspace: Workspace) -> Learned:
        weights = [weight.parameter for weight in layer_weights(workspace.model, workspace.scales)]
        with gradient_over(workspace.scales, weights), _checkpointing_off(workspace.model):
            return Learned(history=_learn_norms(workspace, weights, momentum, epsilon), curvature="exact")

    return run_method(
        "metainit",
        learn,
        model,
        batches,
        loss_fn,
        DEFAULTS if config is None else config,
        holdout=holdout,
        on_iteration=on_iteration,
        collective=collective,
        options={"momentum": momentum, "epsilon": epsilon},
    )


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


@dataclasses.dataclass(frozen=True)
class _Quotient:
    """What one batch gives.

    Attributes:
        by_norm: (number of weights,) dGQ/dn_l.
        read: (3,) GQ, ||g|| and the loss.
    """

    by_norm: Tensor
    read: Tensor


def _learn_norms(
    workspace: Workspace, weights: Sequence[nn.Parameter], momentum: float, epsilon: float
) -> list[IterationRecord]:
    """Leave the weights with the norms that were learned."""
    config, collective = workspace.config, workspace.passes.collective
    start = [weight.detach().clone() for weight in weights]
    start_norms = torch.stack(torch._foreach_norm(start))
    norms, velocity = start_norms.clone(), torch.zeros_like(start_norms)
    history: list[IterationRecord] = []
    for iteration in range(1, config.iterations + 1):
        started, where = time.perf_counter(), f"MetaInit iteration {iteration}"
        batch = workspace.stream.next()
        if collective.any(batch is None)[0]:
            break
        with collective.together():
            quotient = _quotient(workspace, weights, batch, epsilon, iteration, where)
        collective.broadcast_(quotient.by_norm)
        collective.broadcast_(quotient.read)
        value, grad_norm, loss = quotient.read.tolist()
        _check_finite(workspace, weights, quotient, value, where)
        velocity.mul_(momentum).sub_(quotient.by_norm.sign(), alpha=config.lr)
        norms.add_(velocity)
        norms = norms.clamp(config.least_scale * start_norms, config.max_scale * start_norms)
        ratios = list((norms / start_norms).unbind())
        torch._foreach_copy_([weight.data for weight in weights], torch._foreach_mul(start, ratios))
        record = IterationRecord(
            iteration=iteration,
            grad_cosine=None,
            grad_norm=grad_norm,
            loss=loss,
            branch="objective",
            seconds=time.perf_counter() - started,
            curvature="exact",
            micro_batch_size=None,
            objective=value,
        )
        history.append(record)
        if workspace.on_iteration is not None:
            workspace.on_iteration(record)
    return history


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


def _quotient(
    workspace: Workspace, weights: Sequence[nn.Parameter], batch: Any, epsilon: float, iteration: int, where: str
) -> _Quotient:
    """GQ on a batch, and its derivative by the norm of each weight."""
    differentiator = workspace.differentiator
    differentiator.seed = iteration_seed(workspace.config.seed, iteration)
    try:
        with workspace.passes.statistics(batch), CompositeNorms():
            gradient, loss = differentiator.graph_gradient(to_device(batch, differentiator.device))
            value = gradient_quotient(gradient, weights, epsilon)
            slopes = (
                torch.autograd.grad(value, weights, allow_unused=True) if value.requires_grad else [None] * len(weights)
            )
    except RuntimeError as error:
        if is_out_of_memory(error):
            fix = "Give smaller batches, or a device with more memory"
            raise NIOMemoryError(Problem(where, f"out of memory ({one_line(error)})", fix)) from error
        if "derivative for" in str(error):
            fix = "Choose another method: MetaInit differentiates three times"
            raise ModelError(Problem(where, f"an operation has no derivative ({one_line(error)})", fix)) from error
        error.add_note(f"raised at {where}")
        raise
    values = [weight.detach() for weight in weights]
    by_norm = dots(dense(slopes, values), values) / torch.stack(torch._foreach_norm(values))
    return _Quotient(by_norm, torch.stack([value.detach(), norm([g.detach() for g in gradient]), loss]))


def _check_finite(
    workspace: Workspace, weights: Sequence[nn.Parameter], quotient: _Quotient, value: float, where: str
) -> None:
    """Refuse numbers that no norm can be learned from.

    Raises:
        NumericsError: names the weight where only its derivative is not finite.
    """
    fix = "Check the initial weights, lower lr, or raise epsilon"
    if not math.isfinite(value):
        raise NumericsError(Problem(where, f"the gradient quotient is {value}", fix))
    unsound = (~quotient.by_norm.isfinite()).nonzero()
    if unsound.numel():
        name = workspace.scales.name_of(weights[int(unsound[0])])
        raise NumericsError(Problem(where, f"the derivative by the norm of {name} is not finite", fix))
