"""The NIO loop: learn one scale per tensor so that the gradients of sub-batches agree.

Source: Yang et al., "Towards Theoretically Inspired Neural Initialization Optimization", NeurIPS 2022, algorithm 1.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import nn

from nio_hf.core import mode
from nio_hf.core.batches import batch_size, too_many_sub_batches
from nio_hf.core.collective import Collective
from nio_hf.core.config import BatchNormMode, NIOConfig
from nio_hf.core.differentiator import Differentiator, LossFn
from nio_hf.core.loop import Loop, held_out_seed
from nio_hf.core.memory import peak_memory, reset_peak_memory
from nio_hf.core.result import GradCosine, IterationRecord, NIOResult, paired_standard_error
from nio_hf.core.scales import LayerScales
from nio_hf.core.state import NIOState, Resumption
from nio_hf.core.stream import BatchStream
from nio_hf.core.two_pass import TwoPass, located
from nio_hf.core.verdict import judge
from nio_hf.errors import CheckpointError, ConfigError, DataError, Problem

logger = logging.getLogger(__name__)

_SINGLE_PROCESS = Collective()


def initialize(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    config: NIOConfig | None = None,
    *,
    holdout: Sequence[Any] | None = None,
    on_iteration: Callable[[IterationRecord], None] | None = None,
    collective: Collective = _SINGLE_PROCESS,
    resumption: Resumption | None = None,
) -> NIOResult:
    """Learn a scale omega_l per tensor and multiply the weights of the model by them.

    One iteration measures GC and GN of a batch split into D sub-batches. While GN exceeds gamma it takes a step on
    omega that lowers GN, otherwise one that lowers the objective. The weights change once, at the very end: an error
    or an interrupt leaves the model as it was. The random number generators of torch are left as they were found; a
    loss that draws from them draws the same numbers each time it is computed on a sub-batch.

    Args:
        model: a module with fp32 or fp64 parameters.
        batches: any iterable of batches: mappings, tuples or tensors, samples along dimension 0. A re-iterable starts
            again when it is through; an exhausted iterator ends the run with what was learned so far (see
            [`BatchStream`] for data in random order).
        loss_fn: (model, batch) -> mean loss over the samples, or (loss_sum, weight) where the mean is over something
            else, e.g. tokens. It must use the model that it is given.
        config: settings; None for the defaults.
        holdout: batches for the measurements before and after; None sets the first `holdout_batches` of `batches`
            aside, which are then never optimised on.
        on_iteration: called with the record of each iteration.
        collective: the processes that share the work, each of which passes the same batches and the same weights. An
            error of one stops all.
        resumption: where to go on, and how to be stopped; the same batches are passed again, those behind the state
            are drawn and passed over. None to run from the start to the end.

    Returns:
        What was learned, measured and decided. `status` and `message` say what happened.

    Raises:
        ConfigError: D larger than the batch, or settings that do not go together.
        ModelError: a model that cannot be initialised, see [`LayerScales`], or a loss that does not depend on it.
        DataError: no data, too little data, or data that the model does not accept.
        NumericsError: a loss or gradient that is not finite, or zero, with the iteration, sub-batch and tensor.
        NIOMemoryError: where not even one sample at a time fits into memory.
        RankError: what another process raised that is none of our errors.
        StoppedError: where `resumption` asked for it.
        CheckpointError: where its state belongs to another model.
    """
    started = time.perf_counter()
    config = NIOConfig() if config is None else config
    if not isinstance(config, NIOConfig):
        raise ConfigError(Problem("config", f"a {type(config).__name__}", "Give an NIOConfig"))
    resumption = Resumption() if resumption is None else resumption
    with collective.together(), contextlib.ExitStack() as stack:
        scales = LayerScales(model)
        device = scales.scaled[0].device
        reset_peak_memory(device)
        stack.enter_context(mode.isolated(model, device, config.batch_norm))
        set_aside = config.holdout_batches if holdout is None else 0
        stream = BatchStream(batches, config.sub_batches, set_aside + config.iterations)
        held_out = stream.set_aside(set_aside) if holdout is None else _as_batches(holdout)
        autocast = torch.bfloat16 if config.precision == "bf16" else None
        differentiator = Differentiator(model, loss_fn, scales, config.micro_batch_size, autocast)
        passes = TwoPass(model, differentiator, scales, collective, config.batch_norm)
        _check_alike(collective, config, scales, held_out)
        _probe(differentiator, passes, scales, model, collective, held_out[0], config.sub_batches)
        state = _fitting(resumption.state, scales)
        before = _measure(passes, held_out, config, "before NIO") if state is None else state.before
        gamma = _bound(config, before.grad_norm)
        loop = Loop(passes, scales, config, before, gamma, resumption, started)
        with scales.substituted() as initial:
            history = loop.run(stream, initial, on_iteration)
            after = _measure(passes, held_out, config, "after NIO")
        collective.check_equal("the scales of NIO", loop.omega.tolist())
        scales.apply(loop.omega)
    status, message = judge(before, after, paired_standard_error(before, after), history, config, gamma)
    if collective.rank == 0:
        logger.log(logging.INFO if status == "improved" else logging.WARNING, message)
    return NIOResult(
        config=config,
        tensors=scales.report(loop.omega),
        excluded=tuple(scales.excluded),
        history=tuple(history),
        before=before,
        after=after,
        gamma=gamma,
        curvature=history[-1].curvature,
        seconds=loop.seconds(),
        peak_memory=peak_memory(device),
        status=status,
        message=message,
    )


def grad_cosine(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    *,
    sub_batches: int | None = None,
    batch_norm: BatchNormMode = "batch",
    micro_batch_size: int | None = None,
) -> GradCosine:
    """GradCosine and gradient norm of a model on one batch; the model is left as it is.

    Args:
        model: a module with fp32 or fp64 parameters.
        batch: a mapping, tuple or tensor with B samples along dimension 0.
        loss_fn: (model, batch) -> mean loss, or (loss_sum, weight).
        sub_batches: D, from 2 to B; None for D = B, the sample-wise quantity of the theory. Values at different B / D
            are not comparable.
        batch_norm: statistics of batch normalisation: "batch" or "frozen".
        micro_batch_size: samples computed at once; None for a whole sub-batch.

    Returns:
        GC, GN, the D norms and the loss, at overlap 0.

    Raises:
        ConfigError: D outside [2, B], or D = B with the batch statistics of batch normalisation.
        ModelError, DataError, NumericsError: as in [`initialize`].
    """
    size = batch_size(batch)
    count = size if sub_batches is None else sub_batches
    if count > size or size < 2:
        raise ConfigError(too_many_sub_batches(count, size))
    NIOConfig(sub_batches=count, batch_norm=batch_norm, micro_batch_size=micro_batch_size)
    scales = LayerScales(model)
    differentiator = Differentiator(model, loss_fn, scales, micro_batch_size)
    passes = TwoPass(model, differentiator, scales, _SINGLE_PROCESS, batch_norm)
    with mode.isolated(model, scales.scaled[0].device, batch_norm):
        return passes.grad_cosine(batch, count, "batch")


def _check_alike(collective: Collective, config: NIOConfig, scales: LayerScales, held_out: Sequence[Any]) -> None:
    """Refuse processes that have not been given the same task, whose sums would have no meaning."""
    shapes = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in scales.trainable]
    sizes = [batch_size(batch) for batch in held_out]
    collective.check_equal("the model, settings and held-out batches of NIO", (repr(config), shapes, sizes))


def _probe(
    differentiator: Differentiator,
    passes: TwoPass,
    scales: LayerScales,
    model: nn.Module,
    collective: Collective,
    batch: Any,
    sub_batches: int,
) -> None:
    """Leave out tensors that no gradient of the first sub-batch reaches; with micro-batches, check that they add up.

    Rank 0, whose sub-batch it is, tells the others.

    Raises:
        ModelError: for a loss that does not depend on the model.
        ConfigError: with micro-batches, for a mean loss that is not a mean over samples.
    """
    tensors = scales.trainable
    unused = torch.zeros(len(tensors), dtype=torch.int32, device=tensors[0].device)
    with collective.together(), located("the first sub-batch"):
        part = passes.first_sub_batch(batch, sub_batches)
        if collective.rank == 0:
            grads = passes.back_off.run(lambda: differentiator.gradient(part, tensors)[0], part, "the first sub-batch")
            unused += torch.tensor([grad is None for grad in grads], device=unused.device)
            if differentiator.splits(part):
                differentiator.check_splits(part, cast(int, differentiator.micro_batch_size))
    collective.broadcast_(unused)
    left_out = [tensor for tensor, is_unused in zip(tensors, unused.tolist(), strict=True) if is_unused]
    scales.drop_unused(model, left_out)


def _fitting(state: NIOState | None, scales: LayerScales) -> NIOState | None:
    """The state to go on from, where it is one of this model.

    Raises:
        CheckpointError: where it is not.
    """
    if state is not None and len(state.omega) != len(scales.scaled):
        found = f"{len(state.omega)} scales for a model with {len(scales.scaled)} scaled tensors"
        raise CheckpointError(Problem("the state of NIO", found, "Begin without it, or give the model that it is of"))
    return state


def _bound(config: NIOConfig, initial_grad_norm: float) -> float | None:
    """Gamma as an absolute bound on GN; None without one."""
    if config.gamma is not None or config.gamma_relative is None:
        return config.gamma
    return config.gamma_relative * initial_grad_norm


def _as_batches(holdout: Sequence[Any]) -> list[Any]:
    """The held-out batches, where they are a sequence of batches."""
    if not isinstance(holdout, Sequence) or not holdout:
        found = f"a {type(holdout).__name__}" + (" without a batch" if isinstance(holdout, Sequence) else "")
        fix = "Give a list of at least one batch, or None to set some aside"
        raise DataError(Problem("holdout", found, fix))
    return list(holdout)


def _measure(passes: TwoPass, held_out: Sequence[Any], config: NIOConfig, when: str) -> GradCosine:
    readings = []
    for index, batch in enumerate(held_out):
        where, seed = f"held-out batch {index} {when}", held_out_seed(config.seed, index)
        readings.append(passes.grad_cosine(batch, config.sub_batches, where, seed))
    return GradCosine.mean(readings)
