"""Settings of one NIO run, validated together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

from nio_hf.errors import ConfigError, Problem

SearchName = Literal["balance", "published"]
Grouping = Literal["additive", "model", "tensor"]
ObjectiveName = Literal["gc_sum_norm", "gc"]
CurvatureName = Literal["auto", "exact", "finite_difference"]
Precision = Literal["fp32", "bf16"]
ScaledTensors = Literal["all", "weights"]

REPLACED = {
    "holdout_batches": "Set NIOConfig.report_batches",
    "search_batches": "Leave it out: scales are judged on the report batches",
    "scale_sharing": "Set NIOConfig.groups to additive, model, tensor, or a mapping of names to regular expressions",
    "scaled_names": 'Set NIOConfig.groups to a mapping, e.g. {"attention": "attention"}: only what it names is scaled',
    "max_loss_rise": "Set NIOConfig.loss_bound",
    "gamma_relative": "Set NIOConfig.least_norm, or NIOConfig.gamma where NIOConfig.search is published",
    "norm_band": "Set NIOConfig.least_norm, or NIOConfig.gamma where NIOConfig.search is published",
    "min_scale": "Set NIOConfig.scale_range",
    "max_scale": "Set NIOConfig.scale_range",
    "budget": "Leave it out: the scales are computed, not searched for",
    "beta": "Leave it out: it weighed a term of an objective that is no more",
    "save_steps": "Leave it out: NIO is short, and begins again where it was interrupted",
    "batch_norm": "Leave it out: batch normalisation uses the statistics of each sub-batch",
}
"""{former setting: what to do instead}."""


@dataclasses.dataclass(frozen=True)
class NIOConfig:
    """Settings of NIO.

    Letters: omega_k is the scale of group k. A batch has B samples and is split into D sub-batches. GC is the
    GradCosine and GN the gradient norm of a batch (see [`GradCosine`]).

    Args:
        search: How the scales are found. "balance" computes them: layers keep the variance of their inputs, and
            additive tensors become as large as what they are added to (see `nio_hf.core.balance`). "published" is the
            algorithm of the paper: Adam on omega, a new batch for every step (see [`NIOConfig.published`]).
        strength: Exponent t of "balance": omega_k = c_k^t for the computed scales c_k. 1 applies them whole.
        groups: Which tensors share a scale. "additive" sets apart what is added to activations, such as positions and
            tokens; "model" has one scale for all; "tensor" has one for each, for "published" only. A mapping
            {name of a group: regular expression} groups tensors by name, and scales no others.
        scaled_tensors: Tensors that are scaled. "weights" are matrices, tables and tokens. "all" are these and what has
            one number a channel or head, such as biases and the weights of normalisation (see [`kinds_of`]). A mapping
            in `groups` takes precedence.
        sub_batches: Number D of the sub-batches that a batch is split into, from 2 to B.
        report_batches: Number of batches on which GC, GN and loss are measured before and after. Bounds are judged on
            the same ones.
        loss_bound: rho, of "balance": the loss may rise to (1 + rho) times that of the start. None for no bound.
        least_norm: Of "balance": GN may fall to that share of GN at the start. None for no bound.
        scale_range: Least and largest scale omega.
        objective: What "published" raises: "gc_sum_norm" is GC + sum of the D norms, "gc" is GC.
        iterations: Number of steps of "published".
        lr: Learning rate of Adam on omega, of "published".
        gamma: Bound on GN of "published": above it a step lowers GN instead. None for no bound.
        overlap: r in [0, 1), overlap of the sub-batches of "published".
        curvature: How "published" computes Hessian-vector products: "exact" (double backward), "finite_difference"
            (central differences of gradients), or "auto": exact unless an operation has no second derivative. Graphs or
            gradients are kept between the passes where they fit into the memory that is free.
        micro_batch_size: Samples of a sub-batch that are computed at once; None computes a sub-batch whole. An
            out-of-memory halves it by itself.
        precision: Precision of the loss. "fp32" computes in the precision of the parameters. "bf16" computes the loss
            under bfloat16 autocast, with exact curvature only.
        seed: Of the random numbers of losses, and of the order of the samples in "published".

    Raises:
        ConfigError: Lists every setting that is out of range, and former settings with what replaces them.
    """

    search: SearchName = "balance"
    strength: float = 1.0
    groups: Grouping | Mapping[str, str] = "additive"
    scaled_tensors: ScaledTensors = "weights"
    sub_batches: int = 4
    report_batches: int = 4
    loss_bound: float | None = 0.5
    least_norm: float | None = 0.6
    scale_range: tuple[float, float] = (0.01, 100.0)
    objective: ObjectiveName = "gc_sum_norm"
    iterations: int = 100
    lr: float = 0.003
    gamma: float | None = None
    overlap: float = 0.0
    curvature: CurvatureName = "auto"
    micro_batch_size: int | None = None
    precision: Precision = "fp32"
    seed: int = 0

    def __new__(cls, *args: Any, **settings: Any) -> NIOConfig:
        """Refuse former settings by name."""
        refuse_replaced(settings, "NIOConfig.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        scale_range: Any = self.scale_range
        if isinstance(scale_range, list):
            object.__setattr__(self, "scale_range", tuple(scale_range))
        problems = [Problem(f"NIOConfig.{name}", f"{value!r}", fix) for name, value, fix in self._violations()]
        if problems:
            raise ConfigError(*problems)

    @classmethod
    def published(cls, **changes: Any) -> NIOConfig:
        """The run of the paper for ResNet-50: one scale for a tensor, Adam on omega, its windows and rates.

        Source: The configuration files of Yang et al., NeurIPS 2022: rate 0.003, 100 iterations, D = 4, overlap 0.2,
        gamma 10, least scale 0.01, on batches of 64.

        Args:
            **changes: Settings that differ.
        """
        settings: dict[str, Any] = {
            "search": "published",
            "groups": "tensor",
            "scaled_tensors": "all",
            "gamma": 10.0,
            "overlap": 0.2,
        }
        return cls(**(settings | changes))

    @property
    def batches(self) -> int:
        """Number of batches that the search takes, those of the report not counted."""
        return self.iterations if self.search == "published" else 0

    def _violations(self) -> Iterator[tuple[str, object, str]]:
        at_least = {"iterations": 1, "sub_batches": 2, "report_batches": 1, "micro_batch_size": 1}
        for name, least in at_least.items():
            value = getattr(self, name)
            is_open = value is None and name == "micro_batch_size"
            if not is_open and not (is_whole(value) and value >= least):
                yield name, value, f"Give a whole number of at least {least}"
        for name in ("strength", "lr", "gamma", "loss_bound"):
            value = getattr(self, name)
            is_open = value is None and name in ("gamma", "loss_bound")
            if not is_open and not is_positive(value):
                yield name, value, "Give a finite number above 0"
        choices: dict[str, Any] = {
            "search": SearchName,
            "objective": ObjectiveName,
            "scaled_tensors": ScaledTensors,
            "curvature": CurvatureName,
            "precision": Precision,
        }
        for name, literal in choices.items():
            if getattr(self, name) not in get_args(literal):
                yield name, getattr(self, name), f"Choose one of {', '.join(get_args(literal))}"
        if not isinstance(self.groups, Mapping) and self.groups not in get_args(Grouping):
            words = ", ".join(get_args(Grouping))
            yield "groups", self.groups, f"Choose one of {words}, or give a mapping of names to regular expressions"
        if self.least_norm is not None and not (is_positive(self.least_norm) and self.least_norm <= 1):
            yield "least_norm", self.least_norm, "Give a number in (0, 1], or None for no bound"
        if not (is_number(self.overlap) and 0 <= self.overlap < 1):
            yield "overlap", self.overlap, "Give a number in [0, 1)"
        if not (is_whole(self.seed) and self.seed >= 0):
            yield "seed", self.seed, "Give a whole number of at least 0"
        if not (is_range_around_one(self.scale_range) and math.isfinite(self.scale_range[1])):
            yield "scale_range", self.scale_range, "Give two finite numbers, 0 < first <= 1 <= second"
        if self.precision == "bf16" and self.curvature == "finite_difference":
            fix = 'Set NIOConfig.curvature to "exact": bfloat16 rounds away the difference of two gradients'
            yield "precision", self.precision, fix
        if self.search != "published":
            fix = 'Leave it out, or set NIOConfig.search to "published", which alone reads it'
            for name in ("gamma", "overlap"):
                if getattr(self, name):
                    yield name, getattr(self, name), fix


def refuse_replaced(settings: Iterable[str], prefix: str) -> None:
    """Refuse settings of former versions.

    Args:
        settings: Names of the given settings.
        prefix: Text before the name of a setting of [`NIOConfig`], e.g. "nio_".

    Raises:
        ConfigError: Names each, with what replaces it.
    """
    problems = [problem for name in settings if (problem := replaced_setting(name, prefix)) is not None]
    if problems:
        raise ConfigError(*problems)


def replaced_setting(name: str, prefix: str) -> Problem | None:
    """The problem of a setting of a former version, with what replaces it; None for any other name."""
    bare = prefix.rpartition(".")[2]
    own = name.removeprefix(bare)
    if not name.startswith(bare) or own not in REPLACED:
        return None
    return Problem(f"{prefix}{own}", "is a setting of a former version", REPLACED[own].replace("NIOConfig.", prefix))


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_positive(value: Any) -> bool:
    """Whether a value is a finite number above 0."""
    return is_number(value) and value > 0


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 1."""
    return is_whole(value) and value >= 1


def is_range_around_one(value: object) -> bool:
    """Whether a value is a pair of numbers, 0 < least <= 1 <= largest."""
    if not isinstance(value, tuple) or len(value) != 2:
        return False
    least, largest = value
    numbers = all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in value)
    return numbers and 0 < least <= 1 <= largest
