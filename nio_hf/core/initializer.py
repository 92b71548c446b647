"""`initialize`, the frame of all methods: it measures before and after, and applies all of the new weights or none."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nio_hf.core import mode
from nio_hf.core.batches import SAME_BATCHES, batch_size, content_of, take, too_many_sub_batches
from nio_hf.core.collective import Collective
from nio_hf.core.config import NIOConfig
from nio_hf.core.loss import Loss, LossFn, check_micro_batches, gradient, make_loss
from nio_hf.core.memory import peak_memory, reset_peak_memory, with_less_memory
from nio_hf.core.method import Learned, Method, OnIteration, Options, Watch
from nio_hf.core.nio import NIO
from nio_hf.core.problem import ScalingProblem, measure_reports, parts_of
from nio_hf.core.result import GradCosine, GroupScale, InitResult
from nio_hf.core.stream import BatchStream
from nio_hf.core.sub_batches import located, split_check, splits
from nio_hf.core.tensors import ModelTensors, copied_values, find_tensors
from nio_hf.core.verdict import describe_change, judge
from nio_hf.errors import ConfigError, DataError, Problem

INITIALISED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The models that this process has initialised."""


def initialize(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    config: NIOConfig | None = None,
    *,
    method: Method = NIO,
    options: Options | None = None,
    report: Sequence[Any] | None = None,
    on_iteration: OnIteration | None = None,
    on_trial: Callable[[str], None] | None = None,
    collective: Collective | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> InitResult:
    """Find scales omega_k of the groups of a model's weights, and multiply the weights by them.

    How the scales are found is the matter of `config.search`; `balance` and `published` in `nio_hf.core` have one
    module each. The weights change once, at the very end: an error or an interrupt leaves the model as it was. The
    random number generators of torch are left as they were found; a loss that draws from them draws the same numbers
    each time it is computed on a sub-batch.

    Args:
        model: Module with fp32 or fp64 parameters.
        batches: Any iterable of batches: mappings, tuples or tensors, samples along dimension 0. The first
            `report_batches` are reported on. The published search takes the next ones, and starts again when
            a re-iterable is through; an exhausted iterator ends it with what was learned so far.
        loss_fn: (model, batch) -> mean loss over the samples, or (loss_sum, weight) where the mean is over something
            else, e.g. tokens. It must use the model that it is given.
        config: Settings; None for the defaults.
        method: NIO, or one of `nio_hf.baselines.METHODS`.
        options: {name: value} that the method has of its own.
        report: Batches for the measurements before and after; None for the first `report_batches` of `batches`.
        on_iteration: Function that is called with the record of each iteration.
        on_trial: Function that is called with what the next iteration tries, in words.
        collective: Processes that share the work, each of which passes the same batches and the same weights;
            `Collective()` for this process alone. It must be given where torch.distributed is in use. An error of one
            process stops all.
        should_stop: Function that is asked once for each iteration whether the run has to end; None to run to the end.

    Returns:
        Scales, measurements and costs. `status` and `message` say what happened.

    Raises:
        ConfigError: D larger than the batch, settings that do not go together, or groups that do not fit the model.
        ModelError: A model that cannot be initialised, see [`find_tensors`], or a loss that does not depend on it.
        DataError: No data, too little data, or data that the model does not accept.
        NumericsError: A loss or gradient at the start that is not finite, or zero, with the sub-batch and tensor;
            processes that differ in weights or batches.
        NIOMemoryError: Where not even one sample at a time fits into memory.
        RankError: Where another process raised an error that is none of ours.
        StoppedError: Where `should_stop` asked for it on any process.
    """
    started, watch = time.perf_counter(), Watch(on_iteration, on_trial, should_stop)
    config = _checked_config(config)
    grouping = (config.scaled_tensors, config.groups) if method.own_groups else ("all", "tensor")
    processes = _processes(collective)
    model = model.module if isinstance(model, DistributedDataParallel) else model
    with processes.together(), contextlib.ExitStack() as stack:
        chosen = method.checked(options)
        tensors = find_tensors(model, *grouping)
        reset_peak_memory(tensors.device)
        stack.enter_context(mode.isolated(model, tensors.device))
        set_aside = config.report_batches if report is None else 0
        stream = BatchStream(batches, config.sub_batches, set_aside + method.batches(config, chosen))
        reported = stream.set_aside(set_aside) if report is None else _as_batches(report)
        loss = make_loss(model, loss_fn, config, tensors.device)
        _check_alike(processes, config, tensors, reported)
        unreached = _unreached(loss, tensors, config, processes, reported[0])
        if len(unreached) == len(tensors.trainable):
            # There is nothing to measure, which is refused here.
            find_tensors(model, *grouping, unreached)
        larger = method.left_alone(config, model, tensors)
        moved = _Moved(tensors, processes) if unreached else None
        before, size = measure_reports(config, loss, tensors, processes, reported, config.micro_batch_size, moved)
        reached = set() if moved is None else moved.names()
        unused = [name for name in unreached if name not in reached]
        if unused or larger:
            tensors = find_tensors(model, *grouping, unused, larger)
        with copied_values(tensors) as initial:
            problem = ScalingProblem(config, loss, tensors, initial, processes, stream, reported, before, size)
            learned = method.learn(problem, chosen, watch)
            after = learned.after
            if after is None:
                after, _ = problem.measure(learned.micro_batch_size or size)
            values = problem.theta
            omega = _norm_ratios(values, initial) if learned.omega is None else list(learned.omega)
        processes.check_equal(f"the scales of {method.title}", omega)
        with torch.no_grad():
            torch._foreach_copy_([parameter.data for parameter in tensors.scaled_parameters], values)
    if method.own_groups or any(scale != 1 for scale in omega):
        INITIALISED.add(model)
    return _result(method, config, chosen, tensors, learned, omega, before, after, started)


def grad_cosine(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    *,
    sub_batches: int | None = None,
    micro_batch_size: int | None = None,
) -> GradCosine:
    """GradCosine and gradient norm of a model on one batch; the model is left as it is.

    Args:
        model: Module with fp32 or fp64 parameters.
        batch: B samples: a mapping, tuple or tensor, samples along dimension 0.
        loss_fn: (model, batch) -> mean loss, or (loss_sum, weight).
        sub_batches: D; None for D = B, one sample each, the quantity of the theory.
        micro_batch_size: Samples of a sub-batch that are computed at once; None for all.

    Returns:
        GC, GN, the norms and the loss. Values at different B / D are not comparable.

    Raises:
        ConfigError, ModelError, NumericsError: As in [`initialize`].
    """
    size = batch_size(batch)
    count = size if sub_batches is None else sub_batches
    if count < 2:
        raise ConfigError(too_many_sub_batches(count, size))
    config = NIOConfig(sub_batches=count, micro_batch_size=micro_batch_size)
    tensors = find_tensors(model)
    with mode.isolated(model, tensors.device):
        loss = make_loss(model, loss_fn, config, tensors.device)
        measured, _ = measure_reports(config, loss, tensors, Collective(), [batch], micro_batch_size)
    return measured.parts[0]


def expected_cost(
    config: NIOConfig, groups: int, method: Method = NIO, options: Options | None = None, batches: int | None = None
) -> float | None:
    """Training steps of a batch that a run may take at most, reports included; None where that is not known beforehand.

    Args:
        config: Settings.
        groups: Number of groups of tensors.
        method: NIO, or a baseline.
        options: Options of the method.
        batches: Number of batches to report on; None for `report_batches`.

    Raises:
        ConfigError: Lists the options that are unknown or out of range.
    """
    if batches is not None:
        config = dataclasses.replace(config, report_batches=batches)
    most = method.most_cost(config, groups, method.checked(options))
    return None if most is None else most + 2 * config.report_batches


def _result(
    method: Method,
    config: NIOConfig,
    options: Options,
    tensors: ModelTensors,
    learned: Learned,
    omega: Sequence[float],
    before: GradCosine,
    after: GradCosine,
    started: float,
) -> InitResult:
    groups = tuple(learned.groups) or _each_tensor(tensors, omega)
    if method.own_groups:
        status, message = judge(before, after, groups, config, data_exhausted=learned.data_exhausted)
    else:
        status, message = "applied", f"{method.subject} applied: {describe_change(before, after)}."
        if learned.data_exhausted:
            planned = f" of {options['iterations']}" if "iterations" in options else ""
            message += f" The data ended after {len(learned.history)}{planned} iterations."
    if learned.members is not None:
        tensors = dataclasses.replace(tensors, groups=learned.members)
    return InitResult(
        config=config,
        groups=groups,
        tensors=tensors.report(omega),
        excluded=tensors.excluded,
        history=tuple(learned.history),
        before=before,
        after=after,
        cost=learned.cost + len(before.parts) + (len(after.parts) if learned.after is None else 0),
        seconds=time.perf_counter() - started,
        peak_memory=peak_memory(tensors.device),
        status=status,
        message=message,
        method=method.name,
        title=method.title,
        description=method.describe(config),
        options=dict(options),
    )


def _processes(collective: Collective | None) -> Collective:
    """The processes that were given, or this one.

    Raises:
        ConfigError: Where none were given although torch.distributed is in use.
    """
    if collective is not None:
        return collective
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        found = f"not given, with torch.distributed in use by {dist.get_world_size()} processes"
        fix = (
            "Call initialize on all of them with collective=Collective.current(), the same weights and the same "
            "batches, or on one of them with collective=Collective() and broadcast the weights"
        )
        raise ConfigError(Problem("collective", found, fix))
    return Collective()


def _checked_config(config: NIOConfig | None) -> NIOConfig:
    if config is None:
        return NIOConfig()
    if not isinstance(config, NIOConfig):
        raise ConfigError(Problem("config", f"a {type(config).__name__}", "Give an NIOConfig"))
    return config


def _check_alike(processes: Collective, config: NIOConfig, tensors: ModelTensors, reported: Sequence[Any]) -> None:
    """Refuse processes that have not been given the same task, whose sums would have no meaning."""
    if processes.size == 1:
        return
    settings = [(tuple(place.parameter.shape), str(place.parameter.dtype)) for place in tensors.places]
    processes.check_equal("the model class and settings of NIO", (repr(config), settings))
    norms = torch._foreach_norm([place.parameter.detach() for place in tensors.places])
    fix = "Build the model from the same seed on all processes, and call initialize before it is wrapped or prepared"
    processes.check_equal("the weights", [float(norm) for norm in norms], fix)
    processes.check_equal("the report batches", [content_of(batch) for batch in reported], SAME_BATCHES)


def _unreached(loss: Loss, tensors: ModelTensors, config: NIOConfig, processes: Collective, batch: Any) -> list[str]:
    """Names of the tensors that no gradient of two samples reaches; micro-batches are checked to add up.

    Rank 0, whose sub-batch the first one is, tells the others.
    """
    wrt = [place.parameter for place in tensors.trainable]
    flags = torch.zeros(len(wrt), dtype=torch.int32, device=tensors.device)
    with processes.together(), located("the first sub-batch"):
        parts = parts_of(config, loss, Collective(), batch, "the first sub-batch", 0)
        if processes.rank == 0:
            part, size = parts.owned[0], config.micro_batch_size
            check_split = split_check(loss, part, 0)
            small = part if check_split is None else take(part, range(min(2, batch_size(part))))

            def compute(micro: int | None) -> list[Tensor | None]:
                return gradient(loss, small, wrt, seed=0, micro_batch_size=micro)[0]

            grads, _ = with_less_memory(
                compute,
                batch_size(small),
                None,
                where="the first sub-batch",
                device=tensors.device,
                check_split=check_split,
            )
            flags += torch.tensor([grad is None for grad in grads], device=flags.device)
            if size is not None and splits(part, size):
                check_micro_batches(loss, part, size, seed=0)
    processes.broadcast_(flags)
    return [place.name for place, unreached in zip(tensors.trainable, flags.tolist(), strict=True) if unreached]


class _Moved:
    """Keeps which tensors had a gradient other than zero in any sub-batch of any process.

    Few samples do not reach all experts of a mixture, so what two samples do not reach may be used all the same.
    """

    def __init__(self, tensors: ModelTensors, processes: Collective) -> None:
        self._names = [place.name for place in tensors.gradient]
        self._processes = processes
        self._flags = torch.zeros(len(self._names), dtype=torch.int32, device=tensors.device)

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        self._flags += torch.stack([gradient.any() for gradient in gradients]).to(self._flags)

    def names(self) -> set[str]:
        """The names of those tensors; all processes call it."""
        self._processes.sum_(self._flags)
        return {name for name, flag in zip(self._names, self._flags.tolist(), strict=True) if flag}


def _each_tensor(tensors: ModelTensors, omega: Sequence[float]) -> tuple[GroupScale, ...]:
    """Every tensor as a group of its own."""
    return tuple(
        GroupScale(place.name, value, 1, place.parameter.numel())
        for place, value in zip(tensors.scaled, omega, strict=True)
    )


def _norm_ratios(values: Sequence[Tensor], initial: Sequence[Tensor]) -> list[float]:
    """(m,) norm of each new tensor over that of the former one."""
    ratios = torch.stack(torch._foreach_norm(list(values))) / torch.stack(torch._foreach_norm(list(initial)))
    return [float(ratio) for ratio in ratios]


def _as_batches(report: Sequence[Any]) -> list[Any]:
    """The report batches, where they are a sequence of batches."""
    if not isinstance(report, Sequence) or not report:
        found = f"a {type(report).__name__}" + (" without a batch" if isinstance(report, Sequence) else "")
        fix = "Give a list of at least one batch, or None to take the first ones of the data"
        raise DataError(Problem("report", found, fix))
    return list(report)
