"""The NIO loop: learn one scale per tensor so that the gradients of sub-batches agree.

Source: Yang et al., "Towards Theoretically Inspired Neural Initialization Optimization", NeurIPS 2022, algorithm 1.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from nio_hf.core import mode
from nio_hf.core.batches import batch_size, too_many_sub_batches
from nio_hf.core.collective import Collective
from nio_hf.core.config import BatchNormMode, NIOConfig
from nio_hf.core.curvature import CurvaturePath, make_path
from nio_hf.core.differentiator import Differentiator, LossFn
from nio_hf.core.memory import peak_memory, reset_peak_memory
from nio_hf.core.objectives import NormConstraint, Objective, make_objective
from nio_hf.core.optimizer import ScaleAdam
from nio_hf.core.result import Branch, GradCosine, IterationRecord, NIOResult, paired_standard_error
from nio_hf.core.scales import LayerScales
from nio_hf.core.stream import BatchStream
from nio_hf.core.two_pass import Reading, SubBatches, TwoPass, located
from nio_hf.core.verdict import judge
from nio_hf.errors import ConfigError, DataError, NumericsError, Problem

logger = logging.getLogger(__name__)

_HELD_OUT = 500_000
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
        collective: the processes that share the work, each of which passes the same batches and the same weights.

    Returns:
        What was learned, measured and decided. `status` and `message` say what happened.

    Raises:
        ConfigError: D larger than the batch, or settings that do not go together.
        ModelError: a model that cannot be initialised, see [`LayerScales`], or a loss that does not depend on it.
        DataError: no data, too little data, or data that the model does not accept.
        NumericsError: a loss or gradient that is not finite, or zero, with the iteration, sub-batch and tensor.
        NIOMemoryError: where not even one sample at a time fits into memory.
    """
    started = time.perf_counter()
    config = NIOConfig() if config is None else config
    if not isinstance(config, NIOConfig):
        raise ConfigError(Problem("config", f"a {type(config).__name__}", "Give an NIOConfig"))
    scales = LayerScales(model)
    device = scales.scaled[0].device
    reset_peak_memory(device)
    with _isolated(model, device, config.batch_norm):
        set_aside = config.holdout_batches if holdout is None else 0
        stream = BatchStream(batches, config.sub_batches, set_aside + config.iterations)
        held_out = stream.set_aside(set_aside) if holdout is None else _as_batches(holdout)
        autocast = torch.bfloat16 if config.precision == "bf16" else None
        differentiator = Differentiator(model, loss_fn, scales, config.micro_batch_size, autocast)
        passes = TwoPass(model, differentiator, scales, collective, config.batch_norm)
        _probe(differentiator, passes, scales, model, passes.first_sub_batch(held_out[0], config.sub_batches))
        before = _measure(passes, held_out, config, "before NIO")
        gamma = _bound(config, before.grad_norm)
        loop = _Loop(differentiator, passes, scales, config, before.grad_norm, gamma)
        with scales.substituted() as initial:
            history = loop.run(stream, initial, on_iteration)
            after = _measure(passes, held_out, config, "after NIO")
    scales.apply(loop.omega)
    status, message = judge(before, after, paired_standard_error(before, after), history, config, gamma)
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
        seconds=time.perf_counter() - started,
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
    with _isolated(model, scales.scaled[0].device, batch_norm):
        return passes.grad_cosine(batch, count, "batch")


class _Loop:
    """The iterations on omega (m,)."""

    def __init__(
        self,
        differentiator: Differentiator,
        passes: TwoPass,
        scales: LayerScales,
        config: NIOConfig,
        initial_grad_norm: float,
        gamma: float | None,
    ) -> None:
        scaled = scales.scaled
        self.omega = torch.ones(len(scaled), dtype=scaled[0].dtype, device=scaled[0].device)
        self.path: CurvaturePath | None = None
        self._differentiator = differentiator
        self._passes = passes
        self._scales = scales
        self._config = config
        self._gamma = gamma
        self._objective = make_objective(config, initial_grad_norm)
        self._optimizer = ScaleAdam(self.omega, config)
        self._last_gradient = torch.zeros_like(self.omega)

    def run(
        self,
        stream: BatchStream,
        initial: list[Tensor],
        on_iteration: Callable[[IterationRecord], None] | None,
    ) -> list[IterationRecord]:
        """All iterations, or as many as there is data for; `initial` are the W_l."""
        history: list[IterationRecord] = []
        theta = [parameter.data for parameter in self._scales.scaled]
        for iteration in range(1, self._config.iterations + 1):
            started = time.perf_counter()
            batch = stream.next()
            if batch is None:
                break
            branch, reading = self._step(iteration, batch, initial)
            torch._foreach_copy_(theta, torch._foreach_mul(initial, list(self.omega.unbind())))
            seconds = time.perf_counter() - started
            record = IterationRecord(
                iteration=iteration,
                grad_cosine=reading.grad_cosine,
                grad_norm=reading.grad_norm,
                loss=reading.loss,
                branch=branch,
                seconds=seconds,
                curvature=self.path.name if self.path else "",
                micro_batch_size=self._differentiator.micro_batch_size,
            )
            history.append(record)
            if on_iteration is not None:
                on_iteration(record)
        self._check_last_gradient(len(history), float(self._last_gradient.abs().max()))
        return history

    def _step(self, iteration: int, batch: Any, initial: list[Tensor]) -> tuple[Branch, Reading]:
        where = f"NIO iteration {iteration}"
        seed = _mix(self._config.seed, iteration)
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
        """The path of this run, chosen at the first iteration."""
        if self.path is None:
            count = max(len(parts.owned), 1)
            example = next(iter(parts.owned.values()), None)
            self.path = make_path(self._config.curvature, self._differentiator, example, count)
        return self.path

    def _check_last_gradient(self, iteration: int, largest: float) -> None:
        """Refuse a scale gradient that is not finite; `largest` is its largest entry."""
        if math.isfinite(largest):
            return
        position = int((~self._last_gradient.isfinite()).nonzero()[0])
        name = self._scales.name_of(self._scales.scaled[position])
        fix = "Lower lr, set gamma or max_scale, or try another curvature path"
        raise NumericsError(Problem(f"NIO iteration {iteration}", f"the scale gradient of {name} is not finite", fix))


@contextlib.contextmanager
def _isolated(model: nn.Module, device: torch.device, batch_norm: BatchNormMode) -> Iterator[None]:
    """The model in the state it is measured in, with torch's random number generators forked."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), mode.measuring(model, batch_norm):
        yield


def _probe(differentiator: Differentiator, passes: TwoPass, scales: LayerScales, model: nn.Module, batch: Any) -> None:
    """Leave out tensors that no gradient of the first sub-batch reaches; with micro-batches, check that they add up.

    Raises:
        ModelError: for a loss that does not depend on the model.
        ConfigError: with micro-batches, for a mean loss that is not a mean over samples.
    """
    with located("the first sub-batch"):
        tensors = scales.trainable
        grads = passes.back_off.run(lambda: differentiator.gradient(batch, tensors)[0], batch, "the first sub-batch")
        scales.drop_unused(model, [tensor for tensor, grad in zip(tensors, grads, strict=True) if grad is None])
        if differentiator.splits(batch):
            differentiator.check_splits(batch, cast(int, differentiator.micro_batch_size))


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
        where, seed = f"held-out batch {index} {when}", _mix(config.seed, _HELD_OUT + index)
        readings.append(passes.grad_cosine(batch, config.sub_batches, where, seed))
    return GradCosine.mean(readings)


def _mix(seed: int, number: int) -> int:
    return (seed * 1_000_003 + number) % 2**40
