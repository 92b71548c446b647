"""Adam on the vector of scales, with one first moment per branch."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nio_hf.core.config import NIOConfig
from nio_hf.core.result import Branch

BETA1, BETA2, EPS, CLIP = 0.9, 0.999, 1e-8, 1.0


@dataclasses.dataclass(frozen=True)
class AdamState:
    """The moments of [`ScaleAdam`], (m,) each, and the steps behind them.

    Attributes:
        first: {branch: first moment}.
        steps: {branch: its steps}.
        second: the shared second moment.
    """

    first: dict[Branch, list[float]]
    steps: dict[Branch, int]
    second: list[float]


class ScaleAdam:
    """Adam on omega (m,), each scale's gradient clipped to [-1, 1], omega clamped to [least_scale, max_scale].

    The two branches (objective and constraint) have their own first moment, each corrected by the number of its own
    steps; the second moment is shared and corrected by the number of all steps:

        m_b <- beta1 m_b + (1 - beta1) c      v <- beta2 v + (1 - beta2) c^2      c = clip(dJ/domega, -1, 1)
        omega <- clamp(omega - lr (m_b / (1 - beta1^t_b)) / (sqrt(v / (1 - beta2^t)) + eps))

    with beta1 0.9, beta2 0.999, eps 1e-8. Source: the method's published settings, as the specification states them.

    Args:
        omega: (m,) scales, updated in place.
        config: gives lr, least_scale and max_scale.
    """

    def __init__(self, omega: Tensor, config: NIOConfig) -> None:
        self.omega = omega
        self._config = config
        self._first: dict[Branch, Tensor] = {
            "objective": torch.zeros_like(omega),
            "constraint": torch.zeros_like(omega),
        }
        self._steps: dict[Branch, int] = {"objective": 0, "constraint": 0}
        self._second = torch.zeros_like(omega)

    @torch.no_grad()
    def step(self, scale_gradient: Tensor, branch: Branch) -> None:
        """One step with dJ/domega (m,) of a branch."""
        clipped = scale_gradient.clamp(-CLIP, CLIP)
        self._steps[branch] += 1
        first = self._first[branch].lerp_(clipped, 1 - BETA1)
        self._second.mul_(BETA2).addcmul_(clipped, clipped, value=1 - BETA2)
        first_correction = 1 - BETA1 ** self._steps[branch]
        second_correction = 1 - BETA2 ** sum(self._steps.values())
        denominator = (self._second / second_correction).sqrt_().add_(EPS)
        self.omega.addcdiv_(first, denominator, value=-self._config.lr / first_correction)
        self.omega.clamp_(self._config.least_scale, self._config.max_scale)

    def state(self) -> AdamState:
        """The moments so far."""
        first = {branch: moment.tolist() for branch, moment in self._first.items()}
        return AdamState(first, dict(self._steps), self._second.tolist())

    def load(self, state: AdamState) -> None:
        """Go on from moments that `state` gave."""
        self._first = {branch: self.omega.new_tensor(moment) for branch, moment in state.first.items()}
        self._steps = dict(state.steps)
        self._second = self.omega.new_tensor(state.second)
