"""The two passes over the sub-batches of a batch: GC, GN and the losses, then the gradient of the scales."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from nio_hf.core import mode
from nio_hf.core.back_off import BackOff
from nio_hf.core.batches import batch_size, take, to_device
from nio_hf.core.collective import Collective
from nio_hf.core.config import BatchNormMode
from nio_hf.core.curvature import CurvaturePath, Exact
from nio_hf.core.differentiator import Differentiator
from nio_hf.core.gradcosine import GradientSums, dots, sub_batch_windows
from nio_hf.core.objectives import Objective
from nio_hf.core.result import GradCosine
from nio_hf.core.sample_wise import sample_wise_sums
from nio_hf.core.scales import LayerScales
from nio_hf.errors import ConfigError, DataError, ModelError, NIOError, NumericsError, Problem, one_line

logger = logging.getLogger(__name__)

_LABELS_OR_TOKENS = "Check that labels lie between 0 and the number of classes minus 1, and tokens in the vocabulary"
_KNOWN_ERRORS: list[tuple[str, type[NIOError], str, str]] = [
    ("out of bounds", DataError, "an index is out of range", _LABELS_OR_TOKENS),
    ("out of range in self", DataError, "an index is out of range", _LABELS_OR_TOKENS),
    (
        "derivative for",
        ModelError,
        "an operation has no second derivative",
        'Set curvature="finite_difference", which needs first derivatives only',
    ),
    (
        "use_reentrant",
        ModelError,
        "reentrant activation checkpointing gives no gradient of chosen tensors",
        'Checkpoint with use_reentrant=False, in transformers activation_checkpointing_kwargs={"use_reentrant": False}',
    ),
]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the host reads of pass 1.

    Attributes:
        grad_cosine: GC.
        grad_norm: GN.
        norms: (D,) norms n_d.
        losses: (D,) losses L_d.
        carried: the extra scalars that were read along.
    """

    grad_cosine: float
    grad_norm: float
    norms: tuple[float, ...]
    losses: tuple[float, ...]
    carried: tuple[float, ...] = ()

    @classmethod
    def of(cls, sums: GradientSums, carry: Sequence[Tensor] = ()) -> Reading:
        """Read the sums over all sub-batches, and scalar tensors along with them, in one transfer to the host."""
        values = torch.cat([sums.summary(), *(scalar.reshape(1).to(sums.buffer.dtype) for scalar in carry)]).tolist()
        norms_end = 2 + sums.norms.numel()
        losses_end = norms_end + sums.norms.numel()
        return cls(
            grad_cosine=values[0],
            grad_norm=values[1],
            norms=tuple(values[2:norms_end]),
            losses=tuple(values[norms_end:losses_end]),
            carried=tuple(values[losses_end:]),
        )

    @property
    def loss(self) -> float:
        """Mean of the losses of the sub-batches."""
        return math.fsum(self.losses) / len(self.losses)


@dataclasses.dataclass(frozen=True)
class SubBatches:
    """The sub-batches of one batch that this process computes.

    Attributes:
        count: D.
        owned: {d: samples of sub-batch d}, on the device of the model.
        seed: of the random numbers that the loss may draw: each pass over a sub-batch draws the same ones.
    """

    count: int
    owned: dict[int, Any]
    seed: int


class TwoPass:
    """The passes over the sub-batches of all processes; see `curvature` for what a path keeps between them.

    Args:
        model: in the state of [`mode.measuring`].
        differentiator: gives losses and gradients.
        scales: names the tensors.
        collective: the processes that share the sub-batches.
        batch_norm: where batch normalisation takes its statistics from.

    Attributes:
        back_off: makes room where memory runs out.
        collective, differentiator: as given.
    """

    def __init__(
        self,
        model: nn.Module,
        differentiator: Differentiator,
        scales: LayerScales,
        collective: Collective,
        batch_norm: BatchNormMode,
    ) -> None:
        self._model = model
        self.differentiator = differentiator
        self._scales = scales
        self.collective = collective
        self._batch_norm = batch_norm
        splittable = batch_norm == "frozen" or not mode.batch_norms(model)
        self.back_off = BackOff(differentiator, splittable)
        self._own_share = torch.zeros(0)

    def split(
        self, batch: Any, sub_batches: int, *, overlap: float = 0.0, order: Tensor | None = None, seed: int = 0
    ) -> SubBatches:
        """Split a batch into D sub-batches, its samples first put in `order`.

        Raises:
            ConfigError: D outside [2, B], or sub-batches too small for batch normalisation.
        """
        size = batch_size(batch)
        windows = sub_batch_windows(size, sub_batches, overlap)
        if self._batch_norm == "batch":
            check_batch_norm(self._model, min(map(len, windows)), self.differentiator.micro_batch_size)
        order = torch.arange(size) if order is None else order
        owned = {d: take(batch, order[windows[d]]) for d in self.collective.owned(sub_batches)}
        return SubBatches(
            sub_batches, {d: to_device(part, self.differentiator.device) for d, part in owned.items()}, seed
        )

    def first_sub_batch(self, batch: Any, sub_batches: int) -> Any:
        """Sub-batch 0 of a batch at overlap 0."""
        window = sub_batch_windows(batch_size(batch), sub_batches)[0]
        if self._batch_norm == "batch":
            check_batch_norm(self._model, len(window), self.differentiator.micro_batch_size)
        return to_device(take(batch, window), self.differentiator.device)

    @contextlib.contextmanager
    def statistics(self, batch: Any) -> Iterator[None]:
        """Hold batch normalisation at the statistics of the whole batch, where they are frozen."""
        if self._batch_norm == "batch" or not mode.batch_norms(self._model):
            yield
            return
        whole = to_device(batch, self.differentiator.device)
        with mode.frozen_statistics(self._model, lambda: self.differentiator.loss_sum(whole)):
            yield

    def first_pass(
        self,
        path: CurvaturePath,
        parts: SubBatches,
        where: str,
        *,
        with_gradient_sum: bool = False,
        observe: Callable[[Sequence[Tensor]], None] | None = None,
    ) -> GradientSums:
        """Pass 1 over the sub-batches of all processes.

        Args:
            path: computes and keeps the gradients.
            parts: the sub-batches of this process.
            where: names the batch in errors.
            with_gradient_sum: also sum g_d.
            observe: called with each g_d of this process, tensor by tensor.

        Returns:
            The sums over all D sub-batches; nothing is read by the host.
        """
        with self.collective.together():
            sums = GradientSums(self.differentiator.gradient_tensors, parts.count, with_gradient_sum)
            for index, part in parts.owned.items():
                with self._sub_batch(parts, index, where):
                    gradient, loss = self.back_off.run(functools.partial(path.first, part), part, where, path)
                    sums.add(index, gradient, loss)
                    if observe is not None:
                        observe(gradient)
                    del gradient
        self.collective.sum_(sums.buffer)
        self.collective.sum_(sums.norms_and_losses)
        return sums

    def second_pass(
        self,
        path: CurvaturePath,
        parts: SubBatches,
        sums: GradientSums,
        objective: Objective,
        initial: Sequence[Tensor],
        where: str,
    ) -> Tensor:
        """Pass 2 over the sub-batches of all processes, with the path that went through pass 1.

        Args:
            path: forms the Hessian-vector products.
            parts: the sub-batches of this process.
            sums: of pass 1.
            objective: what is differentiated.
            initial: the m initial tensors W_l.
            where: names the batch in errors.

        Returns:
            (m,) dJ/domega_l = sum_d <W_l, (H_d v_d)_l>.
        """
        with self.collective.together():
            total = initial[0].new_zeros(len(initial))
            for kept, (index, part) in enumerate(parts.owned.items()):
                cotangent = functools.partial(objective.cotangent, gradient_norm=sums.norms[index], sums=sums)
                with self._sub_batch(parts, index, where):
                    second = functools.partial(path.second, kept, part, cotangent)
                    total += dots(initial, self.back_off.run(second, part, where, path))
        self._own_share = total.clone()
        self.collective.sum_(total)
        return total

    def mean_loss(self, batch: Any, parts: SubBatches, where: str) -> float:
        """Mean loss of the sub-batches of all processes, at the weights as they are."""
        with self.statistics(batch), self.collective.together():
            total = torch.zeros((), dtype=torch.float64, device=self.differentiator.device)
            for index, part in parts.owned.items():
                with self._sub_batch(parts, index, where):
                    total += self.back_off.run(functools.partial(self.differentiator.mean_loss, part), part, where)
        self.collective.sum_(total)
        return float(total) / parts.count

    def grad_cosine(self, batch: Any, sub_batches: int, where: str, seed: int = 0) -> GradCosine:
        """GC, GN and loss of a batch at overlap 0."""
        parts = self.split(batch, sub_batches, seed=seed)
        with self.statistics(batch):
            sums = self._sample_wise_sums(batch, where, seed) if sub_batches == batch_size(batch) else None
            reading = Reading.of(sums or self.first_pass(Exact(self.differentiator), parts, where))
            self.check(reading, parts, where)
        return GradCosine(reading.grad_cosine, reading.grad_norm, reading.norms, reading.loss, batch_size(batch))

    def _sample_wise_sums(self, batch: Any, where: str, seed: int) -> GradientSums | None:
        """Pass 1 for D = B at once; None where the loss has to be computed sample by sample."""
        if self.collective.size > 1:
            return None
        whole = to_device(batch, self.differentiator.device)
        self.differentiator.seed = seed
        try:
            return self.back_off.run(lambda: sample_wise_sums(self._model, self.differentiator, whole), whole, where)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            logger.info("%s: computed sample by sample, since it cannot be vectorised (%s).", where, one_line(error))
            return None

    def check(self, reading: Reading, parts: SubBatches, where: str) -> None:
        """Refuse losses and gradients that are not finite, and gradients that are zero.

        Raises:
            NumericsError: names the first such sub-batch, the tensor and, of several, the rank that computed it.
        """
        if not any(reading.norms):
            fix = "Check that the loss depends on the trainable tensors and the inputs are not constant"
            raise NumericsError(Problem(where, "the gradients of all sub-batches are zero", fix))
        for index, (gradient_norm, loss) in enumerate(zip(reading.norms, reading.losses, strict=True)):
            if not math.isfinite(loss) or not math.isfinite(gradient_norm) or gradient_norm == 0:
                with self.collective.together():
                    if index in parts.owned:
                        self._refuse(gradient_norm, loss, f"{where}, sub-batch {index}", parts.owned[index])

    def check_scale_gradient(self, gradient: Tensor, where: str) -> None:
        """Refuse a scale gradient of `second_pass` that is not finite; to be called where it is known not to be.

        Raises:
            NumericsError: names the tensor and, of several, the rank that it came from.
        """
        name = self._scales.name_of(self._scales.scaled[int((~gradient.isfinite()).nonzero()[0])])
        fix = "Lower lr, set gamma or max_scale, or try another curvature path"
        error = NumericsError(Problem(where, f"the scale gradient of {name} is not finite", fix))
        with self.collective.together():
            if not self._own_share.isfinite().all():
                raise error
        raise error

    def _refuse(self, gradient_norm: float, loss: float, place: str, part: Any) -> NoReturn:
        """Say what is wrong with a sub-batch of this process."""
        if not math.isfinite(loss):
            fix = "Check inputs, labels and the initial weights"
            raise NumericsError(Problem(place, f"the loss is {loss}", fix))
        if not math.isfinite(gradient_norm):
            fix = "Lower lr, or set gamma or max_scale, if the model was sound at the start"
            found = f"the gradient of {self._first_non_finite(part)} is not finite"
            raise NumericsError(Problem(place, found, fix))
        fix = "Use fewer sub-batches, or check the samples of the batch"
        raise NumericsError(Problem(place, "the gradient is zero, so it has no direction", fix))

    @contextlib.contextmanager
    def _sub_batch(self, parts: SubBatches, index: int, where: str) -> Iterator[None]:
        """Errors of a sub-batch say which it is, and its random numbers are its own."""
        self.differentiator.seed = parts.seed * parts.count + index
        with located(f"{where}, sub-batch {index}"):
            yield

    def _first_non_finite(self, part: Any) -> str:
        tensors = self.differentiator.gradient_tensors
        grads, _ = self.differentiator.dense_gradient(part, tensors)
        for parameter, grad in zip(self._scales.gradient, grads, strict=True):
            if not grad.isfinite().all():
                return self._scales.name_of(parameter)
        return "all tensors together (their squared norm overflows)"


def check_batch_norm(model: nn.Module, smallest: int, micro_batch_size: int | None) -> None:
    """Refuse sub-batches that batch normalisation cannot take its own statistics from.

    Raises:
        ConfigError: for sub-batches of one sample, or computed in parts.
    """
    if not mode.batch_norms(model):
        return
    fix = 'Set batch_norm="frozen", or compute sub-batches of several samples whole'
    if micro_batch_size is not None:
        raise ConfigError(Problem("micro_batch_size", "given for a model with batch normalisation", fix))
    if smallest < 2:
        raise ConfigError(Problem("sub_batches", "one sample per sub-batch under batch normalisation", fix))


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Say where an error of loss_fn came from; what the data or the model cause becomes an error of ours.

    Raises:
        DataError: for labels or tokens out of range.
        ModelError: for an operation without a second derivative, or checkpointing that does not give one.
    """
    try:
        yield
    except Exception as error:
        for text, error_type, found, fix in _KNOWN_ERRORS if isinstance(error, IndexError | RuntimeError) else ():
            if text in str(error):
                raise error_type(Problem(where, f"{found} ({_first_line(error)})", fix)) from error
        error.add_note(f"raised at {where}")
        raise


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
