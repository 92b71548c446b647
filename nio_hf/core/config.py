"""Settings of one NIO run, validated together."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Literal, get_args

from nio_hf.errors import ConfigError, Problem

ObjectiveName = Literal["gc", "gc_norm", "gc_sum_norm", "variance"]
CurvatureName = Literal["auto", "exact", "exact_kept", "finite_difference", "finite_difference_kept"]
BatchNormMode = Literal["batch", "frozen"]
Precision = Literal["fp32", "bf16"]
ScaledTensors = Literal["all", "weights"]
ScaleSharing = Literal["tensor", "kind", "model"]
LEAST_SCALE = 0.01
"""Lower clamp of omega where a scale may fall."""


@dataclasses.dataclass(frozen=True)
class NIOConfig:
    """Settings of NIO.

    The published settings for ResNet-50 are objective "gc_sum_norm", lr 0.003, gamma 10, sub_batches 4, overlap 0.2,
    iterations 100, batch 64 (the authors' configuration files), with scaled_tensors "all", scale_sharing "tensor" and
    max_loss_rise None. The defaults below are our choice, from trainings of a small ViT and Swin
    (benchmarks/warmup_free).

    Args:
        iterations: number of steps on omega.
        sub_batches: D, the number of sub-batches that a batch is split into, 2 to B.
        overlap: r in [0, 1); each sub-batch is lengthened by floor(r B / D) samples of the next.
        gamma: absolute bound on the gradient norm GN; above it a step lowers GN instead of the objective. It replaces
            `gamma_relative`.
        gamma_relative: the bound as a multiple of GN at omega = 1 on the held-out batches. With both None there is no
            bound, which lets GradCosine run into its degenerate maximum.
        max_loss_rise: the iterations end once the loss of a batch exceeds that of the same batch at omega = 1 by more
            than this share: gradients that agree at the cost of the loss are a collapse. None for no such end.
        lr: learning rate of Adam on omega.
        scaled_tensors: "all" trainable tensors, or "weights": those of two or more dimensions, without biases and
            normalisation.
        scaled_names: regular expression that a scaled tensor's parameter name contains, e.g. "attention"; None for any
            name.
        scale_sharing: one omega for each "tensor", as published, one for all tensors of a "kind" (see
            [`TensorScale`]), or one for the whole "model".
        min_scale: lower clamp of omega. None for 1 where one omega is shared by the whole model and gamma asks for no
            lower norm than at the start, else for 0.01: the noise of one batch decides the direction of the first step,
            and smaller weights have a maximum of the objective of their own, where trainings are worse.
        max_scale: upper clamp of omega.
        objective: "gc" (-GC), "gc_norm" (-(GC + beta GN / GN_0)), "gc_sum_norm" (-(GC + sum_d n_d), as published) or
            "variance" (mean squared distance of the sub-batch gradients from their mean).
        beta: weight of the norm in "gc_norm".
        curvature: how Hessian-vector products are computed. "exact" (double backward), "exact_kept" (the graphs of
            the first pass kept), "finite_difference" (central differences), "finite_difference_kept" (the gradients
            of the first pass kept) or "auto": "exact_kept" where the graphs fit into the memory that is free, else
            "exact".
        micro_batch_size: samples of a sub-batch that are computed at once; None computes a sub-batch whole. An
            out-of-memory halves it by itself.
        precision: "fp32" computes in the precision of the parameters; "bf16" computes the loss under bfloat16
            autocast, with exact curvature only.
        batch_norm: "batch" normalises with the statistics of the sub-batch, "frozen" with those of one forward of the
            whole batch, held constant.
        holdout_batches: batches set aside for the measurements before and after, where no hold-out is passed.
        seed: seed of the permutation of each batch.

    Raises:
        ConfigError: lists every setting that is out of range.
    """

    iterations: int = 20
    sub_batches: int = 4
    overlap: float = 0.0
    gamma: float | None = None
    gamma_relative: float | None = 2.0
    max_loss_rise: float | None = 0.1
    lr: float = 0.3
    scaled_tensors: ScaledTensors = "weights"
    scaled_names: str | None = None
    scale_sharing: ScaleSharing = "model"
    min_scale: float | None = None
    max_scale: float = 100.0
    objective: ObjectiveName = "gc_norm"
    beta: float = 1.0
    curvature: CurvatureName = "auto"
    micro_batch_size: int | None = None
    precision: Precision = "fp32"
    batch_norm: BatchNormMode = "batch"
    holdout_batches: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [Problem(f"NIOConfig.{name}", f"{value!r}", fix) for name, value, fix in self._violations()]
        if problems:
            raise ConfigError(*problems)

    def _violations(self) -> list[tuple[str, object, str]]:
        at_least = [("iterations", 1), ("sub_batches", 2), ("holdout_batches", 1), ("micro_batch_size", 1)]
        positive = ["gamma", "gamma_relative", "max_loss_rise", "lr", "min_scale", "max_scale", "beta"]
        choices = [
            ("objective", ObjectiveName),
            ("scaled_tensors", ScaledTensors),
            ("scale_sharing", ScaleSharing),
            ("curvature", CurvatureName),
            ("precision", Precision),
            ("batch_norm", BatchNormMode),
        ]
        found: list[tuple[str, object, str]] = []
        for name, least in at_least:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                found.append((name, value, f"Give a whole number of at least {least}"))
        for name in positive:
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > 0):
                found.append((name, value, "Give a finite number above 0"))
        for name, literal in choices:
            if getattr(self, name) not in get_args(literal):
                found.append((name, getattr(self, name), f"Choose one of {', '.join(get_args(literal))}"))
        if not (_is_number(self.overlap) and 0 <= self.overlap < 1):
            found.append(("overlap", self.overlap, "Give a number in [0, 1)"))
        if self.scaled_names is not None and not _is_pattern(self.scaled_names):
            found.append(("scaled_names", self.scaled_names, 'Give a regular expression, e.g. "attention", or None'))
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            found.append(("seed", self.seed, "Give a whole number of at least 0"))
        if self.precision == "bf16" and self.curvature in ("finite_difference", "finite_difference_kept"):
            fix = 'Use curvature="exact": bfloat16 rounds away the difference of two gradients'
            found.append(("precision", self.precision, fix))
        if self.curvature == "exact_kept" and self.micro_batch_size is not None:
            fix = 'Use curvature="exact" with micro-batches: the graph of a whole sub-batch cannot be kept in parts'
            found.append(("curvature", self.curvature, fix))
        if not found and not self.least_scale <= 1 <= self.max_scale:
            fix = "Choose min_scale <= 1 <= max_scale, since omega starts at 1"
            found.append(("min_scale", (self.least_scale, self.max_scale), fix))
        return found

    @property
    def least_scale(self) -> float:
        """Lower clamp of omega: `min_scale`, or what None stands for."""
        if self.min_scale is not None:
            return self.min_scale
        asks_for_less = self.gamma is not None or (self.gamma_relative is not None and self.gamma_relative < 1)
        return 1.0 if self.scale_sharing == "model" and not asks_for_less else LEAST_SCALE


def _is_pattern(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(value) and re.compile(value) is not None
    except re.error:
        return False


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
