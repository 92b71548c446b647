"""Adam on a vector of scales, with one first moment for each branch, as a pure function of its state."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

Branch = Literal["objective", "constraint"]

BETA1, BETA2, EPS, CLIP = 0.9, 0.999, 1e-8, 1.0


@dataclasses.dataclass(frozen=True)
class AdamState:
    """The moments of [`adam_step`], (K,) each, and the steps behind them.

    Attributes:
        first: {branch: first moment}.
        second: Shared second moment.
        steps: {branch: its steps}.
    """

    first: dict[Branch, tuple[float, ...]]
    second: tuple[float, ...]
    steps: dict[Branch, int]

    @classmethod
    def zeros(cls, size: int) -> AdamState:
        """The state before the first step."""
        zeros = (0.0,) * size
        return cls({"objective": zeros, "constraint": zeros}, zeros, {"objective": 0, "constraint": 0})


def adam_step(state: AdamState, gradient: Tensor, branch: Branch = "objective") -> tuple[Tensor, AdamState]:
    """The direction of one step on a gradient (K,), each entry clipped to [-1, 1], and the state after it.

    The branches (objective and constraint) have their own first moment, each corrected by the number of its own steps;
    the second moment is shared and corrected by the number of all steps:

        m_b <- beta1 m_b + (1 - beta1) c      v <- beta2 v + (1 - beta2) c^2      c = clip(gradient, -1, 1)
        direction = -(m_b / (1 - beta1^t_b)) / (sqrt(v / (1 - beta2^t)) + eps)

    with beta1 0.9, beta2 0.999, eps 1e-8. Source: the method's published settings, as the specification states them.
    """
    clipped = gradient.double().cpu().clamp(-CLIP, CLIP)
    steps = {**state.steps, branch: state.steps[branch] + 1}
    first = torch.tensor(state.first[branch], dtype=torch.float64).lerp(clipped, 1 - BETA1)
    second = BETA2 * torch.tensor(state.second, dtype=torch.float64) + (1 - BETA2) * clipped.square()
    denominator = (second / (1 - BETA2 ** sum(steps.values()))).sqrt() + EPS
    direction = -(first / (1 - BETA1 ** steps[branch])) / denominator
    moments = {**state.first, branch: tuple(first.tolist())}
    return direction, AdamState(moments, tuple(second.tolist()), steps)


def moved(scales: Iterable[float], steps: Iterable[float], scale_range: tuple[float, float]) -> tuple[float, ...]:
    """The scales (K,) after steps, within (least, largest)."""
    least, largest = scale_range
    return tuple(min(max(scale + step, least), largest) for scale, step in zip(scales, steps, strict=True))
