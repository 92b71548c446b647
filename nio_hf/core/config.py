"""Settings of one NIO run, validated together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

from nio_hf.errors import ConfigError, Problem

SearchName = Literal["scan", "gradient", "published"]
Grouping = Literal["model", "additive", "kind", "tensor"]
ObjectiveName = Literal["balance", "gc", "gc_norm", "gc_sum_norm", "variance", "gc_sign"]
ObjectiveSetting = Literal["auto", ObjectiveName]
CurvatureName = Literal["auto", "exact", "finite_difference"]
Precision = Literal["fp32", "bf16"]
ScaledTensors = Literal["all", "weights"]

REPLACED = {
    "holdout_batches": "Set NIOConfig.report_batches",
    "scale_sharing": "Set NIOConfig.groups to model, kind, tensor, or a mapping of names to regular expressions",
    "scaled_names": 'Set NIOConfig.groups to a mapping, e.g. {"attention": "attention"}: only what it names is scaled',
    "max_loss_rise": "Set NIOConfig.loss_bound",
    "gamma_relative": "Set NIOConfig.norm_band, or NIOConfig.gamma where NIOConfig.search is published",
    "min_scale": "Set NIOConfig.scale_range",
    "max_scale": "Set NIOConfig.scale_range",
    "beta": "Leave it out: gc_norm weighs both of its terms alike",
    "batch_norm": "Leave it out: batch normalisation uses the statistics of each sub-batch",
}
"""{former setting: what to do instead}."""
_STEPS = {"scan": (0, 0.0), "gradient": (20, 0.25), "published": (100, 0.003)}
"""{search: (iterations, rate) where none are given}."""


@dataclasses.dataclass(frozen=True)
class NIOConfig:
    """Settings of NIO.

    Letters: omega_k the scale of group k, B samples of a batch, D sub-batches, GC the GradCosine and GN the gradient
    norm of a batch (see [`GradCosine`]).

    Args:
        search: how the scales are found. "scan" tries factors of one group after the other, with first gradients on
            a few fixed batches. "gradient" follows the gradient of the objective by log omega on the same
            batches, for many groups. "published" is the algorithm of the paper: Adam on omega, a new batch for every
            step, and what the last step gives; see [`NIOConfig.published`].
        groups: which tensors share a scale: "model" (all of them), "additive" (what is added to activations, such as
            positions and tokens, apart from all else), "kind" (see [`kinds_of`]), "tensor" (none), or a mapping {name
            of a group: regular expression that the parameter names contain}. A mapping decides by itself what is
            scaled: `scaled_tensors` does not count.
        objective: what the search raises, the mean over its batches: "gc" (GC), "gc_norm" (GC + GN / GN_0, with GN_0
            the norm at the start), "gc_sum_norm" (GC + sum of the D norms, as published), "variance" (minus the mean
            squared distance of the sub-batch gradients from their mean) or "gc_sign" (the cosine of the signs of
            the sub-batch gradients, which Adam's first step follows). "balance" raises nothing: layers are to keep
            the variance of their inputs, and additive tensors to be as large as what they are added to. It is for a
            "scan" of "model" or "additive", where "auto" stands for it; elsewhere "auto" is "gc". "gc_sign" has no
            derivative, and is for "scan" only.
        scaled_tensors: "weights", which are matrices, tables and tokens, or "all" trainable tensors: biases, weights of
            normalisation and what else has one number a channel or head, too (see [`kinds_of`]).
        sub_batches: D, from 2 to B.
        search_batches: number of batches that "scan" and "gradient" judge by; the same ones for every candidate.
        report_batches: number of other batches, that the report before and after is measured on.
        loss_bound: rho, of "scan" and "gradient": at an accepted point the loss of the search batches is at most
            (1 + rho) times that of the start. None for no such bound.
        norm_band: (a, b), likewise: at an accepted point GN is between a and b times that at the common factor, and at
            the common factor at least a times that of the start. None for no such bound.
        scale_range: (least, largest) omega.
        budget: training steps of a search batch beyond which "scan" tries no further group; reports are not counted.
        iterations: steps of "gradient" and "published"; None for 20 and 100.
        lr: learning rate of Adam, on log omega in "gradient", on omega in "published"; None for 0.25 and 0.003.
        gamma: bound on GN of "published": above it a step lowers GN instead. None for no bound.
        overlap: r in [0, 1) of the sub-batches of "published".
        curvature: how Hessian-vector products are computed: "exact" (double backward), "finite_difference" (central
            differences of gradients), or "auto": exact unless an operation has no second derivative. Graphs or
            gradients are kept between the passes where they fit into the memory that is free.
        micro_batch_size: samples of a sub-batch that are computed at once; None computes a sub-batch whole. An
            out-of-memory halves it by itself.
        precision: "fp32" computes in the precision of the parameters; "bf16" computes the loss under bfloat16
            autocast, with exact curvature only.
        seed: of the random numbers of losses, and of the order of the samples in "published".

    Raises:
        ConfigError: lists every setting that is out of range, and former settings with what replaces them.
    """

    search: SearchName = "scan"
    groups: Grouping | Mapping[str, str] = "additive"
    objective: ObjectiveSetting = "auto"
    scaled_tensors: ScaledTensors = "weights"
    sub_batches: int = 4
    search_batches: int = 2
    report_batches: int = 4
    loss_bound: float | None = 0.5
    norm_band: tuple[float, float] | None = (0.6, 1.25)
    scale_range: tuple[float, float] = (0.01, 100.0)
    budget: float = 17.0
    iterations: int | None = None
    lr: float | None = None
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
        for name in ("norm_band", "scale_range"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        problems = [Problem(f"NIOConfig.{name}", f"{value!r}", fix) for name, value, fix in self._violations()]
        if problems:
            raise ConfigError(*problems)

    @classmethod
    def published(cls, **changes: Any) -> NIOConfig:
        """The run of the paper for ResNet-50: one scale for a tensor, Adam on omega, its windows and rates.

        Source: the configuration files of Yang et al., NeurIPS 2022: rate 0.003, 100 iterations, D = 4, overlap 0.2,
        gamma 10, least scale 0.01, on batches of 64.

        Args:
            **changes: settings that differ.
        """
        settings: dict[str, Any] = {
            "search": "published",
            "groups": "tensor",
            "objective": "gc_sum_norm",
            "scaled_tensors": "all",
            "sub_batches": 4,
            "gamma": 10.0,
            "overlap": 0.2,
        }
        return cls(**(settings | changes))

    @property
    def steps(self) -> int:
        """Number of iterations, of a search by steps."""
        return _STEPS[self.search][0] if self.iterations is None else self.iterations

    @property
    def rate(self) -> float:
        """Learning rate, of a search by steps."""
        return _STEPS[self.search][1] if self.lr is None else self.lr

    @property
    def judged_by(self) -> ObjectiveName:
        """The objective, with what "auto" stands for."""
        if self.objective != "auto":
            return self.objective
        return "balance" if self.search == "scan" and self.groups in ("model", "additive") else "gc"

    @property
    def batches(self) -> int:
        """Number of batches that the search takes, those of the report not counted."""
        return self.steps if self.search == "published" else self.search_batches

    def _violations(self) -> Iterator[tuple[str, object, str]]:
        at_least = {"iterations": 1, "sub_batches": 2, "search_batches": 2, "report_batches": 1, "micro_batch_size": 1}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not (is_whole(value) and value >= least):
                yield name, value, f"Give a whole number of at least {least}"
        for name in ("gamma", "loss_bound", "lr", "budget"):
            value = getattr(self, name)
            if value is not None and not is_positive(value):
                yield name, value, "Give a finite number above 0"
        choices: dict[str, Any] = {
            "search": SearchName,
            "objective": ObjectiveSetting,
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
        if not (is_number(self.overlap) and 0 <= self.overlap < 1):
            yield "overlap", self.overlap, "Give a number in [0, 1)"
        if not (is_whole(self.seed) and self.seed >= 0):
            yield "seed", self.seed, "Give a whole number of at least 0"
        if not (is_range_around_one(self.scale_range) and math.isfinite(self.scale_range[1])):
            yield "scale_range", self.scale_range, "Give two finite numbers, 0 < first <= 1 <= second"
        if self.norm_band is not None and not is_range_around_one(self.norm_band):
            yield "norm_band", self.norm_band, "Give two numbers, 0 < first <= 1 <= second"
        if self.precision == "bf16" and self.curvature == "finite_difference":
            fix = 'Set NIOConfig.curvature to "exact": bfloat16 rounds away the difference of two gradients'
            yield "precision", self.precision, fix
        if self.search != "scan" and self.objective in ("balance", "gc_sign"):
            fix = f'Set NIOConfig.search to "scan": {self.objective} has no derivative'
            yield "objective", self.objective, fix
        elif self.objective == "balance" and self.groups not in ("model", "additive"):
            fix = 'Set NIOConfig.groups to "additive": balance is that of what is added with what it is added to'
            yield "objective", self.objective, fix
        for name in ("gamma", "overlap") if self.search != "published" else ():
            if getattr(self, name):
                fix = 'Leave it out, or set NIOConfig.search to "published", the only one that reads it'
                yield name, getattr(self, name), fix


def refuse_replaced(settings: Iterable[str], prefix: str) -> None:
    """Refuse settings of former versions.

    Args:
        settings: names that were given.
        prefix: what stands before the name of a setting of [`NIOConfig`], e.g. "nio_".

    Raises:
        ConfigError: names each, with what replaces it.
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
