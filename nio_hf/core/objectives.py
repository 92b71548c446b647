"""Functions J that the published search lowers, by their cotangents v_d.

Letters as in `gradcosine`. Every cotangent is a linear combination of u and of g_d itself. Source: Yang et al., NeurIPS
2022, section 4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from nio_hf.core.config import ObjectiveName
from nio_hf.core.gradcosine import GradientSums, dots


class Objective(Protocol):
    """A function J of the D gradients, by its slope."""

    def cotangent(self, gradient: Sequence[Tensor], gradient_norm: Tensor, sums: GradientSums) -> list[Tensor]:
        """v_d = dJ/dg_d, tensor by tensor, from g_d, n_d and the sums over all sub-batches."""


@dataclasses.dataclass(frozen=True)
class CosineObjective:
    """J = -(GC + norm_weight sum_d n_d).

    Attributes:
        norm_weight: 0 for GC alone, 1 for the published "gc_sum_norm".
    """

    norm_weight: float = 0.0

    def cotangent(self, gradient: Sequence[Tensor], gradient_norm: Tensor, sums: GradientSums) -> list[Tensor]:
        """-2 / (D (D - 1) n_d) (u - <u, h_d> h_d) - norm_weight h_d."""
        sub_batches = sums.sub_batches
        factor = 2.0 / (sub_batches * (sub_batches - 1)) / gradient_norm
        projection = dots(sums.unit_sum, gradient).sum() / gradient_norm
        combined = list(torch._foreach_mul(list(gradient), (factor * projection - self.norm_weight) / gradient_norm))
        torch._foreach_add_(combined, torch._foreach_mul(list(sums.unit_sum), -factor))
        return combined


@dataclasses.dataclass(frozen=True)
class NormConstraint:
    """J = GN, which the search lowers while GN exceeds gamma."""

    def cotangent(self, gradient: Sequence[Tensor], gradient_norm: Tensor, sums: GradientSums) -> list[Tensor]:
        """h_d / D."""
        return list(torch._foreach_mul(list(gradient), 1.0 / (sums.sub_batches * gradient_norm)))


def make_objective(name: ObjectiveName) -> Objective:
    """The objective of a name."""
    return CosineObjective(norm_weight=1.0 if name == "gc_sum_norm" else 0.0)
