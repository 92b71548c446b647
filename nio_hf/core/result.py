"""What an initialisation measured and did: plain records that serialise to JSON."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any, Literal

from nio_hf.core.config import NIOConfig

Branch = Literal["objective", "constraint"]
Status = Literal["improved", "no_improvement", "constraint_violated", "collapse_suspected", "data_exhausted", "applied"]

_TITLES = {
    "nio": "NIO",
    "none": "default initialisation",
    "gradinit": "GradInit",
    "metainit": "MetaInit",
    "lsuv": "LSUV",
    "emergence": "emergence-promoting initialisation",
    "architecture_aware": "architecture-aware initialisation",
}


@dataclasses.dataclass(frozen=True)
class GradCosine:
    """Agreement and size of the gradients of D sub-batches, at overlap 0 unless it says otherwise.

    Attributes:
        value: GC = (||u||^2 - D) / (D (D - 1)) with u the sum of the unit gradients, in [-1 / (D - 1), 1].
        grad_norm: GN, the mean of `norms`.
        norms: (D,) gradient norm ||g_d|| of each sub-batch.
        loss: mean of the losses of the sub-batches.
        batch_size: B, the number of samples. Values at different B / D are not comparable.
        parts: the measurements that this one is the mean of; empty for a single batch.
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

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> GradCosine:
        """Inverse of `dataclasses.asdict`, after a trip through JSON."""
        parts = tuple(cls.from_dict(part) for part in fields["parts"])
        return cls(**{**fields, "norms": tuple(fields["norms"]), "parts": parts})


@dataclasses.dataclass(frozen=True)
class IterationRecord:
    """One iteration, measured before its step.

    Attributes:
        iteration: counted from 1.
        grad_cosine: GC of the iteration's batch, at the overlap that is optimised on; None for methods without it.
        grad_norm: GN of the iteration's batch, or the norm that the method bounds.
        loss: mean loss over the sub-batches.
        branch: "constraint" where GN exceeded gamma, else "objective".
        seconds: wall time of the iteration, its data included.
        curvature: the path that computed the Hessian-vector products, as in `NIOConfig.curvature`.
        micro_batch_size: samples computed at once; None for whole sub-batches.
        objective: what the method optimises, where that is not GC.
    """

    iteration: int
    grad_cosine: float | None
    grad_norm: float
    loss: float
    branch: Branch
    seconds: float
    curvature: str
    micro_batch_size: int | None
    objective: float | None = None


@dataclasses.dataclass(frozen=True)
class TensorScale:
    """The scale of one tensor and where in the model it sits.

    Attributes:
        name: parameter name in memory. It is not portable and is left out of saved files.
        kind: what the tensor is, e.g. "linear weight", "norm bias", "embedding", "parameter".
        depth: position of the enclosing block, 0 for what comes before the first block.
        shape: shape of the tensor.
        omega: the scale; for a method that draws weights anew, the ratio of their norm to the former one.
    """

    name: str
    kind: str
    depth: int
    shape: tuple[int, ...]
    omega: float


@dataclasses.dataclass(frozen=True)
class ExcludedTensor:
    """A tensor that keeps its values.

    Attributes:
        name: parameter name in memory, left out of saved files.
        kind: as in [`TensorScale`].
        shape: shape of the tensor.
        reason: why it is not scaled: "zero", "frozen", "unused", "vector" where only weights are, or "name" where only
            some names are.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class InitResult:
    """Outcome of `initialize` and of the other methods.

    Attributes:
        config: the settings that it ran with.
        tensors: the scaled tensors in parameter order.
        excluded: the tensors left as they were, with the reason.
        history: one record per iteration.
        before: GradCosine on the held-out batches before.
        after: the same with the new weights.
        gamma: the bound on the gradient norm that was in force, absolute; None without one.
        curvature: the path of the last iteration.
        seconds: wall time of the whole run.
        peak_memory: bytes; peak of the allocator on an accelerator, peak resident set of the process on CPU.
        status: what happened, in one word.
        message: the same in a sentence.
        method: name of the method.
        options: its own settings, beside `config`.
    """

    config: NIOConfig
    tensors: tuple[TensorScale, ...]
    excluded: tuple[ExcludedTensor, ...]
    history: tuple[IterationRecord, ...]
    before: GradCosine
    after: GradCosine
    gamma: float | None
    curvature: str
    seconds: float
    peak_memory: int
    status: Status
    message: str
    method: str = "nio"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name of the method as its paper writes it."""
        return _TITLES.get(self.method, self.method)

    @property
    def scales(self) -> dict[str, float]:
        """{parameter name: omega}."""
        return {tensor.name: tensor.omega for tensor in self.tensors}

    @property
    def gain(self) -> float:
        """Rise of GC on the held-out batches."""
        return self.after.value - self.before.value

    @property
    def gain_standard_error(self) -> float:
        """Standard error of `gain`, paired over the held-out batches; NaN with fewer than two."""
        return paired_standard_error(self.before, self.after)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary without parameter names, which differ between library versions."""
        fields = dataclasses.asdict(self)
        for tensor in (*fields["tensors"], *fields["excluded"]):
            del tensor["name"]
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> InitResult:
        """Inverse of `to_dict`; tensors are named by their position."""
        return cls(
            **{
                **fields,
                "config": NIOConfig(**fields["config"]),
                "tensors": _unnamed(TensorScale, fields["tensors"]),
                "excluded": _unnamed(ExcludedTensor, fields["excluded"]),
                "history": tuple(IterationRecord(**record) for record in fields["history"]),
                "before": GradCosine.from_dict(fields["before"]),
                "after": GradCosine.from_dict(fields["after"]),
            }
        )


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


def _unnamed(record_type: type[Any], rows: list[dict[str, Any]]) -> tuple[Any, ...]:
    return tuple(
        record_type(**{**row, "name": f"tensor {index}", "shape": tuple(row["shape"])})
        for index, row in enumerate(rows)
    )
