"""What all methods of initialisation have in common: measured before and after, applied whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from nio_hf.core import mode
from nio_hf.core.batches import batch_size
from nio_hf.core.collective import Collective
from nio_hf.core.config import NIOConfig
from nio_hf.core.differentiator import Differentiator, LossFn
from nio_hf.core.loop import held_out_seed
from nio_hf.core.memory import peak_memory, reset_peak_memory
from nio_hf.core.result import GradCosine, InitResult, IterationRecord, paired_standard_error
from nio_hf.core.scales import LayerScales
from nio_hf.core.stream import BatchStream
from nio_hf.core.two_pass import TwoPass, located
from nio_hf.core.verdict import describe_change, judge
from nio_hf.errors import ConfigError, DataError, Problem

logger = logging.getLogger(__name__)

NIO = "nio"
"""Name of the method of this library, beside which the others are baselines."""
SINGLE_PROCESS = Collective()
OnIteration = Callable[[IterationRecord], None]


@dataclasses.dataclass(frozen=True)
class Workspace:
    """What a method works with, while the parameters of the model hold copies of their values.

    Attributes:
        model: in the state of [`mode.measuring`]. What a method leaves in its scaled tensors is the outcome.
        loss_fn: (model, batch) -> mean loss, or (loss_sum, weight).
        config: settings.
        scales: names the tensors.
        initial: the m scaled tensors W_l as they were.
        differentiator: gives losses and gradients.
        passes: over sub-batches.
        stream: of the batches that are not held out.
        before: GradCosine on the held-out batches.
        started: `time.perf_counter()` at the start of the run.
        on_iteration: to be called with the record of each iteration.
    """

    model: nn.Module
    loss_fn: LossFn
    config: NIOConfig
    scales: LayerScales
    initial: list[Tensor]
    differentiator: Differentiator
    passes: TwoPass
    stream: BatchStream
    before: GradCosine
    started: float
    on_iteration: OnIteration | None

    @property
    def theta(self) -> list[Tensor]:
        """The m scaled tensors as the model computes with them, to be written to."""
        return [parameter.data for parameter in self.scales.scaled]


@dataclasses.dataclass(frozen=True)
class Learned:
    """What a method did.

    Attributes:
        omega: (m,) scale of each scaled tensor; None for the ratio of its norm to the former one.
        history: one record per iteration.
        gamma: absolute bound on the gradient norm that was in force.
        curvature: the path of the last iteration, where there is one.
        seconds: wall time, that of earlier sessions included; None where there were none.
        loss_rise: by what share the loss of a batch had risen when that ended the iterations; None where it did not.
    """

    omega: Tensor | None = None
    history: Sequence[IterationRecord] = ()
    gamma: float | None = None
    curvature: str = ""
    seconds: float | None = None
    loss_rise: float | None = None


_NOT_SHARED: dict[str, Any] = {
    "scaled_tensors": "all",
    "scaled_names": None,
    "scale_sharing": "tensor",
    "max_loss_rise": None,
}
"""Settings of NIO as other methods have them."""


class Learn(Protocol):
    """The part of a method that is its own."""

    def __call__(self, workspace: Workspace) -> Learned:
        """Leave the new weights in the scaled tensors of the model."""


def run_method(
    method: str,
    learn: Learn,
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    config: NIOConfig | None,
    *,
    iterations: int | None = None,
    holdout: Sequence[Any] | None = None,
    on_iteration: OnIteration | None = None,
    collective: Collective = SINGLE_PROCESS,
    measured_before: Callable[[LayerScales], GradCosine | None] = lambda scales: None,
    options: Mapping[str, Any] | None = None,
) -> InitResult:
    """Measure, let a method do its work on copies of the weights, measure again, and apply what it did.

    The weights change once, at the very end: an error or an interrupt leaves the model as it was, and the random number
    generators of torch always.

    Args:
        method: its name.
        learn: its own part.
        model: as in [`initialize`], and likewise what follows.
        batches: see there.
        loss_fn: see there.
        config: see there; methods other than NIO have a scale for every tensor, and no `max_loss_rise`.
        iterations: batches that it takes at most; None for `config.iterations`.
        holdout: see there.
        on_iteration: see there.
        collective: see there.
        measured_before: gives the first measurement, where an earlier session has made it.
        options: its own settings, for the record.

    Raises:
        NIOError: as in [`initialize`].
    """
    started = time.perf_counter()
    name = NIO.upper() if method == NIO else method
    config = NIOConfig() if config is None else config
    if not isinstance(config, NIOConfig):
        raise ConfigError(Problem("config", f"a {type(config).__name__}", "Give an NIOConfig"))
    if method != NIO:
        config = dataclasses.replace(config, **_NOT_SHARED)
    with collective.together(), contextlib.ExitStack() as stack:
        scales = LayerScales(model, config.scaled_tensors, config.scaled_names)
        device = scales.scaled[0].device
        reset_peak_memory(device)
        stack.enter_context(mode.isolated(model, device, config.batch_norm))
        set_aside = config.holdout_batches if holdout is None else 0
        needed = config.iterations if iterations is None else iterations
        stream = BatchStream(batches, config.sub_batches, set_aside + needed)
        held_out = stream.set_aside(set_aside) if holdout is None else _as_batches(holdout)
        autocast = torch.bfloat16 if config.precision == "bf16" else None
        differentiator = Differentiator(model, loss_fn, scales, config.micro_batch_size, autocast)
        passes = TwoPass(model, differentiator, scales, collective, config.batch_norm)
        _check_alike(collective, config, scales, held_out)
        _probe(differentiator, passes, scales, model, collective, held_out[0], config.sub_batches)
        before = measured_before(scales) or measure(passes, held_out, config, f"before {name}")
        with scales.substituted() as initial:
            workspace = Workspace(
                model=model,
                loss_fn=loss_fn,
                config=config,
                scales=scales,
                initial=initial,
                differentiator=differentiator,
                passes=passes,
                stream=stream,
                before=before,
                started=started,
                on_iteration=on_iteration,
            )
            learned = learn(workspace)
            after = measure(passes, held_out, config, f"after {name}")
            values = workspace.theta
            omega = _norm_ratios(values, initial) if learned.omega is None else learned.omega
        collective.check_equal(f"the scales of {name}", omega.tolist())
        scales.apply(values)
    if method == NIO:
        error = paired_standard_error(before, after)
        status, message = judge(before, after, error, learned.history, config, learned.gamma, learned.loss_rise)
    else:
        done = len(learned.history)
        ended = (
            f" The data ended after {done} of {config.iterations} iterations." if 0 < done < config.iterations else ""
        )
        status, message = "applied", f"{name} applied: {describe_change(before, after)}.{ended}"
    if collective.rank == 0:
        logger.log(logging.INFO if status in ("improved", "applied") else logging.WARNING, message)
    return InitResult(
        config=config,
        tensors=scales.report(omega),
        excluded=tuple(scales.excluded),
        history=tuple(learned.history),
        before=before,
        after=after,
        gamma=learned.gamma,
        curvature=learned.curvature,
        seconds=time.perf_counter() - started if learned.seconds is None else learned.seconds,
        peak_memory=peak_memory(device),
        status=status,
        message=message,
        method=method,
        options=dict(options or {}),
    )


def measure(passes: TwoPass, held_out: Sequence[Any], config: NIOConfig, when: str) -> GradCosine:
    """GC, GN and loss, the mean over the held-out batches."""
    readings = []
    for index, batch in enumerate(held_out):
        where, seed = f"held-out batch {index} {when}", held_out_seed(config.seed, index)
        readings.append(passes.grad_cosine(batch, config.sub_batches, where, seed))
    return GradCosine.mean(readings)


def absolute_gamma(config: NIOConfig, initial_grad_norm: float) -> float | None:
    """Gamma as an absolute bound on the gradient norm; None without one."""
    if config.gamma is not None or config.gamma_relative is None:
        return config.gamma
    return config.gamma_relative * initial_grad_norm


def _norm_ratios(values: Sequence[Tensor], initial: Sequence[Tensor]) -> Tensor:
    """(m,) norm of each new tensor over that of the former one."""
    return torch.stack(torch._foreach_norm(list(values))) / torch.stack(torch._foreach_norm(list(initial)))


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


def _as_batches(holdout: Sequence[Any]) -> list[Any]:
    """The held-out batches, where they are a sequence of batches."""
    if not isinstance(holdout, Sequence) or not holdout:
        found = f"a {type(holdout).__name__}" + (" without a batch" if isinstance(holdout, Sequence) else "")
        fix = "Give a list of at least one batch, or None to set some aside"
        raise DataError(Problem("holdout", found, fix))
    return list(holdout)
