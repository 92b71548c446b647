"""Records of an initialisation, its measurements and its scales, which serialise to JSON."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

from nio_hf.core.config import NIOConfig
from nio_hf.core.records import restored

Outcome = Literal["accepted", "loss_bound", "least_norm", "lower_norm"]
"""Outcome of an iteration: "accepted"; "loss_bound" or "least_norm", refused by a bound; "lower_norm", a step that
lowered the gradient norm."""
Status = Literal[
    "improved",
    "worsened",
    "changed",
    "unchanged",
    "constraint_violated",
    "collapse_suspected",
    "data_exhausted",
    "applied",
]


@dataclasses.dataclass(frozen=True)
class GradCosine:
    """Agreement and size of the gradients of D sub-batches, at overlap 0 unless it says otherwise.

    Attributes:
        value: GC = (||u||^2 - D) / (D (D - 1)) with u the sum of the unit gradients, in [-1 / (D - 1), 1].
        grad_norm: GN, the mean of `norms`.
        norms: (D,) gradient norm ||g_d|| of each sub-batch.
        loss: Mean of the losses of the sub-batches.
        batch_size: B, the number of samples. Values at different B / D are not comparable.
        parts: Measurements that this one is the mean of; empty for a single batch.
    """

    value: float
    grad_norm: float
    norms: tuple[float, ...]
    loss: float
    batch_size: int
    parts: tuple[GradCosine, ...] = ()

    @property
    def sub_batches(self) -> int:
        """D, the number of sub-batches."""
        return len(self.norms)

    @property
    def standard_error(self) -> float:
        """Standard error of `value` over `parts`; NaN with fewer than two."""
        return _standard_error([part.value for part in self.parts])

    @classmethod
    def mean(cls, parts: list[GradCosine]) -> GradCosine:
        """The mean over batches, which keeps them as `parts`."""
        return cls(
            value=statistics.fmean(part.value for part in parts),
            grad_norm=statistics.fmean(part.grad_norm for part in parts),
            norms=tuple(statistics.fmean(column) for column in zip(*(part.norms for part in parts), strict=True)),
            loss=statistics.fmean(part.loss for part in parts),
            batch_size=parts[0].batch_size,
            parts=tuple(parts),
        )


@dataclasses.dataclass(frozen=True)
class IterationRecord:
    """One iteration: what was tried, what was measured there, and what became of it.

    Attributes:
        iteration: Counted from 1.
        tried: Candidate in words, e.g. "all x4".
        outcome: Outcome of the iteration.
        loss: Mean loss over the sub-batches; NaN where it is not finite.
        grad_cosine: GC; None where it was not computed.
        grad_norm: GN, or the norm that a baseline bounds; None where it was not computed.
        objective: Value that the method raises or lowers, where it is not GC.
        scale: Common factor that was tried; None where each tensor has its own.
        cost: Training steps of arithmetic.
        seconds: Wall time, its data included.
        micro_batch_size: Samples computed at once; None for whole sub-batches.
    """

    iteration: int
    tried: str
    outcome: Outcome
    loss: float
    grad_cosine: float | None = None
    grad_norm: float | None = None
    objective: float | None = None
    scale: float | None = None
    cost: float = 0.0
    seconds: float = 0.0
    micro_batch_size: int | None = None


@dataclasses.dataclass(frozen=True)
class GroupScale:
    """The scale of one group of tensors.

    Attributes:
        name: Name of the group.
        omega: Scale of the group.
        tensors: Number of its tensors.
        parameters: Number of their entries.
    """

    name: str
    omega: float
    tensors: int
    parameters: int


@dataclasses.dataclass(frozen=True)
class TensorScale:
    """The scale of one tensor and where in the model it sits.

    Attributes:
        name: Parameter name in memory; in saved files its position, as names are not portable.
        kind: Kind of the tensor, see [`kinds_of`].
        depth: Position of the enclosing block, 0 for what comes before the first block.
        shape: Shape of the tensor.
        omega: Scale; for a method that draws weights anew, the ratio of their norm to the former one.
        group: Name of the group that shares the scale.
    """

    name: str
    kind: str
    depth: int
    shape: tuple[int, ...]
    omega: float
    group: str


@dataclasses.dataclass(frozen=True)
class ExcludedTensor:
    """A tensor that keeps its values.

    Attributes:
        name: Parameter name, as in [`TensorScale`].
        kind: Kind of the tensor, see [`kinds_of`].
        shape: Shape of the tensor.
        reason: Why it is not scaled: "zero", "frozen", "unused", "vector" where only weights are scaled, "larger"
            (drawn larger on purpose, see `drawn_larger` in `nio_hf.core.layers`), or "no group".
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str


def last_quarter(losses: Sequence[float]) -> slice:
    """The steps that a lane of a race is judged by, the last one at least."""
    return slice(max(len(losses) - max(len(losses) // 4, 1), 0), None)


@dataclasses.dataclass(frozen=True)
class Lane:
    """The first steps of a training from the weights of one candidate.

    Attributes:
        name: Name of the candidate.
        losses: Losses of its training steps, up to the first that is not finite.
    """

    name: str
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Mean over the last quarter of the steps; NaN where the first loss was not finite."""
        if not self.losses:
            return math.nan
        return statistics.fmean(self.losses[last_quarter(self.losses)])


@dataclasses.dataclass(frozen=True)
class Race:
    """How candidates were told apart by their first steps of training.

    Attributes:
        steps: Number of steps of a candidate that is not stopped before.
        lanes: Candidates; the weights of the initialisation come first.
        winner: Name of the candidate whose weights the training begins from.
    """

    steps: int
    lanes: tuple[Lane, ...]
    winner: str

    @property
    def cost(self) -> int:
        """Training steps of all lanes together."""
        return sum(len(lane.losses) for lane in self.lanes)

    @property
    def message(self) -> str:
        """Outcome of the race in a sentence."""
        ended = ", ".join(f"{lane.name} {lane.loss:.3f} at step {len(lane.losses)}" for lane in self.lanes)
        return f"Race, training loss: {ended}. The training begins from: {self.winner}."


@dataclasses.dataclass(frozen=True)
class InitResult:
    """Outcome of `initialize` and of the other methods.

    Attributes:
        config: Settings that it ran with.
        groups: Groups of tensors that share a scale.
        tensors: Scaled tensors in parameter order.
        excluded: Tensors left as they were, with the reason.
        history: One record per iteration.
        before: GradCosine on the report batches before.
        after: GradCosine on the report batches with the new weights.
        cost: Training steps of one batch that it took, reports included.
        seconds: Wall time of the whole run.
        peak_memory: Bytes; peak of the allocator on an accelerator, peak resident set of the process on CPU.
        status: Outcome in one word.
        message: Outcome in a sentence.
        method: Name of the method.
        title: Name of the method as its paper writes it.
        description: What the method does, in a sentence.
        options: Options of the method, beside `config`.
        race: Race of the new weights against those before; None without a race.
    """

    config: NIOConfig
    groups: tuple[GroupScale, ...]
    tensors: tuple[TensorScale, ...]
    excluded: tuple[ExcludedTensor, ...]
    history: tuple[IterationRecord, ...]
    before: GradCosine
    after: GradCosine
    cost: float
    seconds: float
    peak_memory: int
    status: Status
    message: str
    method: str = "nio"
    title: str = "NIO"
    description: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    race: Race | None = None

    @property
    def scales(self) -> dict[str, float]:
        """{parameter name: omega}."""
        return {tensor.name: tensor.omega for tensor in self.tensors}

    @property
    def gain(self) -> float:
        """Rise of GC on the report batches."""
        return self.after.value - self.before.value

    @property
    def gain_standard_error(self) -> float:
        """Standard error of `gain`, paired over the report batches; NaN with fewer than two."""
        return paired_standard_error(self.before, self.after)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary in which tensors are named by their position, since libraries rename parameters."""
        fields = dataclasses.asdict(self)
        if all(tensor.group == tensor.name for tensor in self.tensors):
            _number_groups(fields, {tensor.name: f"tensor {index}" for index, tensor in enumerate(self.tensors)})
        for rows in (fields["tensors"], fields["excluded"]):
            for index, row in enumerate(rows):
                row["name"] = f"tensor {index}"
        for record in fields["history"]:
            # JSON has no word for NaN.
            record["loss"] = record["loss"] if math.isfinite(record["loss"]) else None
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> InitResult:
        """Inverse of `to_dict`; tensors keep the numbers that they are named by there."""
        history = [
            {**record, "loss": math.nan if record["loss"] is None else record["loss"]} for record in fields["history"]
        ]
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in fields["options"].items()}
        result: InitResult = restored(cls, {**fields, "history": history, "options": options})
        return result


NIOResult = InitResult
"""The name of [`InitResult`] where the method is NIO."""


def paired_standard_error(before: GradCosine, after: GradCosine) -> float:
    """Standard error of the mean rise of GC over the same batches; NaN with fewer than two."""
    pairs = zip(after.parts, before.parts, strict=True)
    return _standard_error([late.value - early.value for late, early in pairs])


def _standard_error(values: list[float]) -> float:
    if len(values) < 2:
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


def _number_groups(fields: dict[str, Any], numbers: dict[str, str]) -> None:
    """Put numbers in the place of the groups that are named like their tensor."""
    for group in fields["groups"]:
        group["name"] = numbers[group["name"]]
    for tensor in fields["tensors"]:
        tensor["group"] = numbers[tensor["group"]]
