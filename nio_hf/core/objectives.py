"""What NIO optimises: objectives J and their cotangents v_d = dJ/dg_d.

Letters as in `gradcosine`. Every cotangent is a linear combination of a sum over the sub-batches and of g_d itself.
Source of GC and GN: Yang et al., NeurIPS 2022, section 4; GC + beta GN and the variance are our choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from nio_hf.core.config import NIOConfig
from nio_hf.core.gradcosine import GradientSums, dots


class Objective(Protocol):
    """A function J of the D gradients."""

    @property
    def needs_gradient_sum(self) -> bool:
        """Whether `cotangent` reads sum_d g_d."""

    def cotangent(self, gradient: Sequence[Tensor], gradient_norm: Tensor, sums: GradientSums) -> list[Tensor]:
        """v_d = dJ/dg_d, tensor by tensor, from g_d, n_d and the sums over all sub-batches."""


@dataclasses.dataclass(frozen=True)
class CosineObjective:
    """J = -(GC + norm_weight sum_d n_d).

    Attributes:
        norm_weight: 0 for GC alone, beta / (GN_0 D) for "gc_norm", 1 for the published "gc_sum_norm".
    """

    norm_weight: float = 0.0
    needs_gradient_sum: bool = dataclasses.field(default=False, init=False)

    def cotangent(self, gradient: Sequence[Tensor], gradient_norm: Tensor, sums: GradientSums) -> list[Tensor]:
        """-2 / (D (D - 1) n_d) (u - <u, h_d> h_d) - norm_weight h_d."""
        sub_batches = sums.norms.numel()
        factor = 2.0 / (sub_batches * (sub_batches - 1)) / gradient_norm
        projection = dots(sums.unit_sum, gradient).sum() / gradient_norm
        return _combine(sums.unit_sum, -factor, gradient, (factor * projection - self.norm_weight) / gradient_norm)


@dataclasses.dataclass(frozen=True)
class VarianceObjective:
    """J = (1 / D) sum_d ||g_d - mean g||^2."""

    needs_gradient_sum: bool = dataclasses.field(default=True, init=False)

    def cotangent(self, gradient: Sequence[Tensor], gradient_norm: Tensor, sums: GradientSums) -> list[Tensor]:
        """(2 / D) (g_d - mean g)."""
        sub_batches = sums.norms.numel()
        weight = torch.full_like(gradient_norm, 2.0 / sub_batches)
        return _combine(sums.gradient_sum, -weight / sub_batches, gradient, weight)


@dataclasses.dataclass(frozen=True)
class NormConstraint:
    """J = GN, lowered while GN exceeds gamma."""

    needs_gradient_sum: bool = dataclasses.field(default=False, init=False)

    def cotangent(self, gradient: Sequence[Tensor], gradient_norm: Tensor, sums: GradientSums) -> list[Tensor]:
        """h_d / D."""
        return list(torch._foreach_mul(list(gradient), 1.0 / (sums.norms.numel() * gradient_norm)))


def make_objective(config: NIOConfig, initial_grad_norm: float) -> Objective:
    """The objective that a configuration names; `initial_grad_norm` is GN_0."""
    match config.objective:
        case "gc":
            return CosineObjective()
        case "gc_norm":
            return CosineObjective(norm_weight=config.beta / (initial_grad_norm * config.sub_batches))
        case "gc_sum_norm":
            return CosineObjective(norm_weight=1.0)
        case "variance":
            return VarianceObjective()


def _combine(total: Sequence[Tensor], total_weight: Tensor, own: Sequence[Tensor], own_weight: Tensor) -> list[Tensor]:
    combined = list(torch._foreach_mul(list(own), own_weight))
    torch._foreach_add_(combined, torch._foreach_mul(list(total), total_weight))
    return combined
