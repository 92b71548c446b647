"""The NIO loop: learn scales of the weights so that the gradients of sub-batches agree.

Source: Yang et al., "Towards Theoretically Inspired Neural Initialization Optimization", NeurIPS 2022, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from nio_hf.core import mode
from nio_hf.core.batches import batch_size, too_many_sub_batches
from nio_hf.core.collective import Collective
from nio_hf.core.config import BatchNormMode, NIOConfig
from nio_hf.core.cosine_steps import CosineSteps
from nio_hf.core.differentiator import Differentiator, LossFn
from nio_hf.core.loop import Loop
from nio_hf.core.method import NIO, SINGLE_PROCESS, Learned, Workspace, absolute_gamma, run_method
from nio_hf.core.result import GradCosine, InitResult, IterationRecord
from nio_hf.core.scales import LayerScales
from nio_hf.core.state import NIOState, Resumption
from nio_hf.core.two_pass import TwoPass
from nio_hf.errors import CheckpointError, ConfigError, Problem


def initialize(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    config: NIOConfig | None = None,
    *,
    holdout: Sequence[Any] | None = None,
    on_iteration: Callable[[IterationRecord], None] | None = None,
    collective: Collective = SINGLE_PROCESS,
    resumption: Resumption | None = None,
) -> InitResult:
    """Learn scales omega_l, one for all weights or one for each, and multiply the weights of the model by them.

    One iteration measures GC and GN of a batch split into D sub-batches. While GN exceeds gamma it takes a step on
    omega that lowers GN, otherwise one that lowers the objective. The iterations end early where the loss has risen by
    more than `max_loss_rise`. The weights change once, at the very end: an error
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
    resumption = Resumption() if resumption is None else resumption

    def learn(workspace: Workspace) -> Learned:
        gamma = absolute_gamma(workspace.config, workspace.before.grad_norm)
        loop = Loop(
            workspace.passes,
            workspace.scales,
            workspace.config,
            workspace.before,
            resumption,
            workspace.started,
        )
        steps = CosineSteps(workspace, loop, gamma)
        history = loop.run(steps, workspace.stream, workspace.initial, workspace.on_iteration)
        return Learned(loop.omega, history, gamma, history[-1].curvature, loop.seconds(), steps.loss_rise)

    def measured_before(scales: LayerScales) -> GradCosine | None:
        state = _fitting(resumption.state, scales)
        return None if state is None else state.before

    return run_method(
        NIO,
        learn,
        model,
        batches,
        loss_fn,
        config,
        holdout=holdout,
        on_iteration=on_iteration,
        collective=collective,
        measured_before=measured_before,
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
    passes = TwoPass(model, differentiator, scales, SINGLE_PROCESS, batch_norm)
    with mode.isolated(model, scales.scaled[0].device, batch_norm):
        return passes.grad_cosine(batch, count, "batch")


def _fitting(state: NIOState | None, scales: LayerScales) -> NIOState | None:
    """The state to go on from, where it is one of this model.

    Raises:
        CheckpointError: where it is not.
    """
    if state is not None and len(state.omega) != len(scales.scaled):
        found = f"{len(state.omega)} scales for a model with {len(scales.scaled)} scaled tensors"
        raise CheckpointError(Problem("the state of NIO", found, "Begin without it, or give the model that it is of"))
    return state
