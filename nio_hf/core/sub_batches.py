"""Pass 1 over the sub-batches of a batch: their gradients, of which GC, GN and the losses are kept."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nio_hf.core import mode
from nio_hf.core.batches import all_ignored_labels, batch_size, take, to_device
from nio_hf.core.collective import Collective
from nio_hf.core.gradcosine import GradientSums
from nio_hf.core.loss import Loss, check_micro_batches, dense_gradient, graph_gradient
from nio_hf.core.memory import with_less_memory
from nio_hf.core.result import GradCosine
from nio_hf.core.tensors import ModelTensors, TensorPlace
from nio_hf.errors import ConfigError, DataError, ModelError, NIOError, NumericsError, Problem

T = TypeVar("T")
Keep = Literal["graphs", "gradients"] | None

GradientAndLoss = tuple[list[Tensor], Tensor]

_LABELS_OR_TOKENS = "Check that labels lie between 0 and the number of classes minus 1, and tokens in the vocabulary"
_KNOWN_ERRORS: list[tuple[str, type[NIOError], str, str]] = [
    ("out of bounds", DataError, "an index is out of range", _LABELS_OR_TOKENS),
    ("out of range in self", DataError, "an index is out of range", _LABELS_OR_TOKENS),
    (
        "derivative for",
        ModelError,
        "an operation has no second derivative",
        'Set NIOConfig.curvature to "finite_difference", which needs first derivatives only',
    ),
    (
        "don't support automatic differentiation",
        ModelError,
        "an operation with out=... has no derivative",
        'Set NIOConfig.curvature to "finite_difference", or compute without out=',
    ),
    (
        "use_reentrant",
        ModelError,
        "reentrant activation checkpointing gives no gradient of chosen tensors",
        'Checkpoint with use_reentrant=False, in transformers activation_checkpointing_kwargs={"use_reentrant": False} '
        "(gradient_checkpointing_kwargs in older releases)",
    ),
]


@dataclasses.dataclass(frozen=True)
class SubBatches:
    """The sub-batches of one batch that this process computes.

    Attributes:
        count: D.
        owned: {d: samples of sub-batch d}, on the device of the model.
        seed: Seed of the random numbers of the loss: each pass over a sub-batch draws the same ones.
        batch_size: B.
        where: Name of the batch in errors.
    """

    count: int
    owned: dict[int, Any]
    seed: int
    batch_size: int
    where: str

    def seed_of(self, index: int) -> int:
        """Seed of sub-batch `index`."""
        return self.seed * self.count + index


@dataclasses.dataclass(frozen=True)
class FirstPass:
    """Results of pass 1.

    Attributes:
        sums: Sums over all D sub-batches, still on the device.
        kept: {d: gradient of sub-batch d}, with its graph or without; empty where nothing is kept.
        micro_batch_size: Samples computed at once in the end.
    """

    sums: GradientSums
    kept: dict[int, list[Tensor]]
    micro_batch_size: int | None


def split(
    batch: Any,
    windows: Sequence[Sequence[int]],
    loss: Loss,
    collective: Collective,
    *,
    where: str,
    seed: int = 0,
    order: Tensor | None = None,
    micro_batch_size: int | None = None,
) -> SubBatches:
    """Split a batch into the sub-batches that this process owns.

    Args:
        batch: B samples.
        windows: Positions of each sub-batch, after the samples are put in `order`.
        loss: Loss, which has model and device.
        collective: Processes that share the sub-batches.
        where: Name of the batch in errors.
        seed: Seed of the random numbers of the loss.
        order: (B,) permutation; None for the order of the batch.
        micro_batch_size: Samples to compute at once, as asked for.

    Raises:
        ConfigError: Sub-batches that are too small for batch normalisation, or computed in parts under it.
    """
    check_batch_norm(loss.model, min(map(len, windows)), micro_batch_size)
    owned = {}
    for index in collective.owned(len(windows)):
        positions = torch.as_tensor(windows[index])
        owned[index] = to_device(take(batch, positions if order is None else order[positions]), loss.device)
    return SubBatches(len(windows), owned, seed, batch_size(batch), where)


def first_pass(
    loss: Loss,
    wrt: Sequence[nn.Parameter],
    parts: SubBatches,
    collective: Collective,
    *,
    micro_batch_size: int | None = None,
    keep: Keep = None,
    observe: Callable[[Sequence[Tensor]], None] | None = None,
) -> FirstPass:
    """Pass 1 over the sub-batches of all processes: one forward and one backward for each.

    Args:
        loss: Loss of the model.
        wrt: Gradient tensors.
        parts: Sub-batches of this process.
        collective: Processes that share the work.
        micro_batch_size: Samples computed at once; None for all.
        keep: Kind of results that are kept of each sub-batch, where memory allows it.
        observe: Function that is called with each g_d of this process, tensor by tensor.
    """
    kept: dict[int, list[Tensor]] = {}
    keeping = keep

    def drop_kept() -> bool:
        nonlocal keeping
        dropped, keeping = keeping is not None, None
        kept.clear()
        return dropped

    with collective.together():
        sums = GradientSums(wrt, parts.count)
        for index, part in parts.owned.items():

            def compute(size: int | None, part: Any = part, seed: int = parts.seed_of(index)) -> GradientAndLoss:
                if keeping == "graphs" and not splits(part, size):
                    return graph_gradient(loss, part, wrt, seed=seed)
                return dense_gradient(loss, part, wrt, seed=seed, micro_batch_size=size)

            (gradient, value), micro_batch_size = on_sub_batch(loss, parts, index, compute, micro_batch_size, drop_kept)
            if keeping == "gradients" or (keeping == "graphs" and gradient[0].requires_grad):
                kept[index] = gradient
            detached = [tensor.detach() for tensor in gradient]
            sums.add(index, detached, value)
            if observe is not None:
                observe(detached)
            del gradient, detached
    collective.sum_(sums.buffer)
    collective.sum_(sums.scalars)
    return FirstPass(sums, kept, micro_batch_size)


def on_sub_batch(
    loss: Loss,
    parts: SubBatches,
    index: int,
    compute: Callable[[int | None], T],
    micro_batch_size: int | None,
    drop_kept: Callable[[], bool] = lambda: False,
) -> tuple[T, int | None]:
    """Compute on a sub-batch of this process; errors say which it is, and memory that runs out is made.

    Args:
        loss: Loss of the model.
        parts: Sub-batches of this process.
        index: Number of the sub-batch.
        compute: Function that gives the result for a micro-batch size.
        micro_batch_size: Samples computed at once in the first attempt; None for all.
        drop_kept: Function that forgets results kept between the passes; it returns False where there were none.

    Returns:
        The result, and the micro-batch size that it took.
    """
    part = parts.owned[index]
    with located(f"{parts.where}, sub-batch {index}"):
        return with_less_memory(
            compute,
            batch_size(part),
            micro_batch_size,
            where=parts.where,
            device=loss.device,
            drop_kept=drop_kept,
            check_split=split_check(loss, part, parts.seed_of(index)),
        )


def measure(
    loss: Loss,
    tensors: ModelTensors,
    parts: SubBatches,
    collective: Collective,
    *,
    micro_batch_size: int | None = None,
    keep: Keep = None,
    observe: Callable[[Sequence[Tensor]], None] | None = None,
) -> tuple[FirstPass, GradCosine]:
    """Pass 1 with what the host reads of it, checked: what it gave, and GC with GN and loss.

    The arguments are those of `first_pass`.

    Raises:
        NumericsError: As in [`check`].
    """
    first = first_pass(
        loss,
        tensors.gradient_parameters,
        parts,
        collective,
        micro_batch_size=micro_batch_size,
        keep=keep,
        observe=observe,
    )
    measured = read(first.sums, parts)
    check(measured, first, parts, tensors, loss, collective)
    return first, measured


def read(sums: GradientSums, parts: SubBatches) -> GradCosine:
    """GC, GN and loss of pass 1, in one transfer from the device."""
    value, *per_part = torch.cat([sums.grad_cosine.reshape(1), sums.scalars.flatten()]).tolist()
    norms, losses = per_part[: sums.sub_batches], per_part[sums.sub_batches :]
    return GradCosine(
        value=value,
        grad_norm=math.fsum(norms) / len(norms),
        norms=tuple(norms),
        loss=math.fsum(losses) / len(losses),
        batch_size=parts.batch_size,
    )


def check(
    measured: GradCosine, first: FirstPass, parts: SubBatches, tensors: ModelTensors, loss: Loss, collective: Collective
) -> None:
    """Refuse losses and gradients that are not finite, and gradients that are zero.

    Raises:
        NumericsError: Names the first such sub-batch, the tensor and, of several, the rank that computed it.
    """
    losses = first.sums.scalars[1].tolist() if not math.isfinite(measured.loss) else [measured.loss] * parts.count
    if not any(measured.norms) and math.isfinite(measured.loss):
        _refuse_zero(parts, tensors, collective)
    for index, (grad_norm, value) in enumerate(zip(measured.norms, losses, strict=True)):
        if not math.isfinite(value) or not math.isfinite(grad_norm) or grad_norm == 0:
            with collective.together():
                if index in parts.owned:
                    _refuse(grad_norm, value, index, parts, tensors, loss, first.micro_batch_size)


def check_finite(values: Tensor, places: Sequence[TensorPlace], what: str, where: str, fix: str) -> None:
    """Refuse values, one for each tensor, that are not finite; without data there is nothing to refuse.

    Raises:
        NumericsError: A value that is not finite, with the tensor.
    """
    if values.is_meta:
        return
    unsound = (~values.isfinite()).nonzero()
    if unsound.numel():
        name = places[int(unsound[0])].name
        raise NumericsError(Problem(where, f"the {what} of {name} is not finite", fix))


def splits(batch: Any, micro_batch_size: int | None) -> bool:
    """Whether a batch is computed in micro-batches."""
    return micro_batch_size is not None and micro_batch_size < batch_size(batch)


def split_check(loss: Loss, part: Any, seed: int) -> Callable[[int], None] | None:
    """Checks whether a sub-batch may be computed in parts of a size; None where batch normalisation forbids it."""
    if mode.batch_norms(loss.model):
        return None
    return functools.partial(check_micro_batches, loss, part, seed=seed)


def check_batch_norm(model: nn.Module, smallest: int, micro_batch_size: int | None) -> None:
    """Refuse sub-batches that batch normalisation cannot take its own statistics from.

    Raises:
        ConfigError: Sub-batches of one sample, or computed in parts.
        ModelError: Batch normalisation that is synchronised between processes.
    """
    norms = mode.batch_norms(model)
    if not norms:
        return
    if dist.is_available() and dist.is_initialized() and any(isinstance(norm, nn.SyncBatchNorm) for norm in norms):
        fix = "Convert the layers to SyncBatchNorm after the initialisation"
        raise ModelError(Problem(type(model).__name__, "SyncBatchNorm, in which processes wait for each other", fix))
    if micro_batch_size is not None:
        fix = "Leave it out: the statistics are those of a whole sub-batch. Larger NIOConfig.sub_batches save memory"
        raise ConfigError(Problem("NIOConfig.micro_batch_size", "given for a model with batch normalisation", fix))
    if smallest < 2:
        fix = "Choose fewer sub-batches, or give larger batches"
        raise ConfigError(Problem("NIOConfig.sub_batches", "one sample for a sub-batch under batch normalisation", fix))


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Say where an error of loss_fn came from; what the data or the model cause becomes an error of ours.

    Raises:
        DataError: Labels or tokens out of range.
        ModelError: An operation without a second derivative, or checkpointing that does not give one.
    """
    try:
        yield
    except Exception as error:
        for text, error_type, found, fix in _KNOWN_ERRORS if isinstance(error, IndexError | RuntimeError) else ():
            if text in str(error):
                raise error_type(Problem(where, f"{found} ({str(error).splitlines()[0]})", fix)) from error
        error.add_note(f"raised at {where}")
        raise


def refuse_zero_heads(tensors: ModelTensors) -> None:
    """Refuse a model whose head is zero: nothing in front of it has a gradient.

    Raises:
        NumericsError: With the name of the head.
    """
    for name in tensors.zero_heads:
        fix = "Draw its values anew, e.g. with the standard deviation 0.02"
        raise NumericsError(Problem(name, "all zero, so that no gradient passes it to the rest of the model", fix))


def _refuse_zero(parts: SubBatches, tensors: ModelTensors, collective: Collective) -> NoReturn:
    """Say why the gradients of all sub-batches are zero, as far as it is known."""
    refuse_zero_heads(tensors)
    fix = "Check that the loss depends on the trainable tensors and the inputs are not constant"
    with collective.together():
        ignored = [index for index, part in parts.owned.items() if all_ignored_labels(part)]
        if ignored:
            _refuse_ignored(f"{parts.where}, sub-batch {ignored[0]}")
    if parts.count == parts.batch_size:
        fix += ". A loss that compares samples with each other is constant on one sample: choose fewer sub-batches"
    raise NumericsError(Problem(parts.where, "the gradients of all sub-batches are zero", fix))


def _refuse_ignored(place: str) -> NoReturn:
    fix = "Give larger batches, choose fewer sub-batches, or leave such samples out"
    raise DataError(Problem(place, "every label is ignored, so there is no loss to differentiate", fix))


def _refuse(
    grad_norm: float,
    value: float,
    index: int,
    parts: SubBatches,
    tensors: ModelTensors,
    loss: Loss,
    micro_batch_size: int | None,
) -> NoReturn:
    """Say what is wrong with a sub-batch of this process."""
    part, place = parts.owned[index], f"{parts.where}, sub-batch {index}"
    if all_ignored_labels(part):
        _refuse_ignored(place)
    if not math.isfinite(value):
        raise NumericsError(Problem(place, f"the loss is {value}", "Check inputs, labels and the initial weights"))
    if not math.isfinite(grad_norm):
        fix = "Check inputs, labels and the initial weights, or narrow NIOConfig.scale_range"
        name = _first_non_finite(part, parts.seed_of(index), tensors, loss, micro_batch_size)
        found = f"the gradient of {name} is not finite"
        raise NumericsError(Problem(place, found, fix))
    fix = "Use fewer sub-batches, or check the samples of the batch"
    raise NumericsError(Problem(place, "the gradient is zero, so it has no direction", fix))


def _first_non_finite(part: Any, seed: int, tensors: ModelTensors, loss: Loss, micro_batch_size: int | None) -> str:
    wrt = tensors.gradient_parameters
    grads, _ = dense_gradient(loss, part, wrt, seed=seed, micro_batch_size=micro_batch_size)
    for place, grad in zip(tensors.gradient, grads, strict=True):
        if not grad.isfinite().all():
            return place.name
    return "all tensors together (their squared norm overflows)"
