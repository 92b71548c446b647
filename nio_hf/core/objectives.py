"""What a search raises: scores of a batch, and the cotangents v_d of J = -score.

Letters as in `gradcosine`. Every cotangent is a linear combination of a sum over the sub-batches and of g_d itself.
Source of GC, GN and "gc_sum_norm": Yang et al., NeurIPS 2022, section 4; the others are our choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from nio_hf.core.config import ObjectiveName
from nio_hf.core.gradcosine import ExtraSum, GradientSums, dots, squared_norm


class Differentiable(Protocol):
    """A function J of the D gradients, by its slope."""

    def cotangent(self, gradient: Sequence[Tensor], gradient_norm: Tensor, sums: GradientSums) -> list[Tensor]:
        """v_d = dJ/dg_d, tensor by tensor, from g_d, n_d and the sums over all sub-batches."""


class Objective(Differentiable, Protocol):
    """A function of the D gradients."""

    @property
    def extra(self) -> ExtraSum:
        """The sum that it needs beside u, as in [`GradientSums`]."""

    def score(self, sums: GradientSums) -> Tensor:
        """-J of a batch, a scalar tensor: the higher, the better."""


@dataclasses.dataclass(frozen=True)
class CosineObjective:
    """J = -(GC + norm_weight sum_d n_d).

    Attributes:
        norm_weight: 0 for GC alone, 1 / (GN_0 D) for "gc_norm", 1 for the published "gc_sum_norm".
    """

    norm_weight: float = 0.0
    extra: ExtraSum = dataclasses.field(default=None, init=False)

    def score(self, sums: GradientSums) -> Tensor:
        """GC + norm_weight sum_d n_d."""
        return sums.grad_cosine + self.norm_weight * sums.norms.sum()

    def cotangent(self, gradient: Sequence[Tensor], gradient_norm: Tensor, sums: GradientSums) -> list[Tensor]:
        """-2 / (D (D - 1) n_d) (u - <u, h_d> h_d) - norm_weight h_d."""
        sub_batches = sums.sub_batches
        factor = 2.0 / (sub_batches * (sub_batches - 1)) / gradient_norm
        projection = dots(sums.unit_sum, gradient).sum() / gradient_norm
        return _combine(sums.unit_sum, -factor, gradient, (factor * projection - self.norm_weight) / gradient_norm)


@dataclasses.dataclass(frozen=True)
class VarianceObjective:
    """J = (1 / D) sum_d ||g_d - mean g||^2."""

    extra: ExtraSum = dataclasses.field(default="gradient", init=False)

    def score(self, sums: GradientSums) -> Tensor:
        """-((1 / D) sum_d n_d^2 - ||mean g||^2)."""
        return squared_norm(sums.extra_sum) / sums.sub_batches**2 - sums.norms.square().mean()

    def cotangent(self, gradient: Sequence[Tensor], gradient_norm: Tensor, sums: GradientSums) -> list[Tensor]:
        """(2 / D) (g_d - mean g)."""
        weight = torch.full_like(gradient_norm, 2.0 / sums.sub_batches)
        return _combine(sums.extra_sum, -weight / sums.sub_batches, gradient, weight)


@dataclasses.dataclass(frozen=True)
class SignObjective:
    """J = -(mean over pairs i != j of cos(sign g_i, sign g_j)), the agreement of Adam's first steps."""

    extra: ExtraSum = dataclasses.field(default="sign", init=False)

    def score(self, sums: GradientSums) -> Tensor:
        """(||sum_d s_d||^2 - sum_d ||s_d||^2) / ((D - 1) sum_d ||s_d||^2) with s_d = sign(g_d)."""
        lengths = sums.scalars[2].sum()
        return (squared_norm(sums.extra_sum) - lengths) / ((sums.sub_batches - 1) * lengths)

    def cotangent(self, gradient: Sequence[Tensor], gradient_norm: Tensor, sums: GradientSums) -> list[Tensor]:
        """There is none: the settings refuse signs for searches that need a derivative."""
        raise NotImplementedError("signs have no derivative")


@dataclasses.dataclass(frozen=True)
class NormConstraint:
    """J = GN, which the published search lowers while GN exceeds gamma."""

    extra: ExtraSum = dataclasses.field(default=None, init=False)

    def score(self, sums: GradientSums) -> Tensor:
        """-GN."""
        return -sums.norms.mean()

    def cotangent(self, gradient: Sequence[Tensor], gradient_norm: Tensor, sums: GradientSums) -> list[Tensor]:
        """h_d / D."""
        return list(torch._foreach_mul(list(gradient), 1.0 / (sums.sub_batches * gradient_norm)))


def make_objective(name: ObjectiveName, sub_batches: int, initial_grad_norm: float) -> Objective:
    """The objective of a name; `initial_grad_norm` is GN_0."""
    match name:
        case "gc" | "balance":
            return CosineObjective()
        case "gc_norm":
            return CosineObjective(norm_weight=1 / (initial_grad_norm * sub_batches))
        case "gc_sum_norm":
            return CosineObjective(norm_weight=1.0)
        case "variance":
            return VarianceObjective()
        case "gc_sign":
            return SignObjective()


def _combine(total: Sequence[Tensor], total_weight: Tensor, own: Sequence[Tensor], own_weight: Tensor) -> list[Tensor]:
    combined = list(torch._foreach_mul(list(own), own_weight))
    torch._foreach_add_(combined, torch._foreach_mul(list(total), total_weight))
    return combined
