"""Adam on omega against steps computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nio_hf.core import NIOConfig
from nio_hf.core.optimizer import ScaleAdam

LR, LOW, HIGH = 0.05, 0.8, 1.3
STEPS: list[tuple[Any, list[float]]] = [
    ("objective", [0.3, -5.0, 1e-4]),
    ("objective", [-0.7, -0.2, 2e-4]),
    ("constraint", [0.9, -3.0, -0.5]),
    ("objective", [0.1, -1.0, 0.0]),
    ("constraint", [2.0, -0.4, -0.5]),
    ("constraint", [0.6, -0.9, -0.5]),
    ("objective", [0.8, -0.9, -0.5]),
    ("objective", [0.9, -0.8, -0.5]),
    ("objective", [0.9, -0.8, -0.5]),
]


class ByHand:
    """The update of one scale in plain numbers."""

    def __init__(self) -> None:
        self.omega, self.second = 1.0, 0.0
        self.first = {"objective": 0.0, "constraint": 0.0}
        self.steps = {"objective": 0, "constraint": 0}

    def step(self, gradient: float, branch: str) -> None:
        clipped = max(-1.0, min(1.0, gradient))
        self.steps[branch] += 1
        self.first[branch] = 0.9 * self.first[branch] + 0.1 * clipped
        self.second = 0.999 * self.second + 0.001 * clipped**2
        mean = self.first[branch] / (1 - 0.9 ** self.steps[branch])
        square = self.second / (1 - 0.999 ** sum(self.steps.values()))
        self.omega = max(LOW, min(HIGH, self.omega - LR * mean / (math.sqrt(square) + 1e-8)))


def test_interleaved_branches_follow_the_steps_computed_by_hand() -> None:
    omega = torch.ones(3, dtype=torch.float64)
    optimizer = ScaleAdam(omega, NIOConfig(lr=LR, min_scale=LOW, max_scale=HIGH))
    scales = [ByHand() for _ in range(3)]
    reached = set()
    for branch, gradient in STEPS:
        optimizer.step(torch.tensor(gradient, dtype=torch.float64), branch)
        for scale, value in zip(scales, gradient, strict=True):
            scale.step(value, branch)
        expected = [scale.omega for scale in scales]
        assert omega.tolist() == pytest.approx(expected, abs=1e-12)
        reached |= set(expected) & {LOW, HIGH}
    assert reached == {LOW, HIGH}


def test_the_first_step_is_the_learning_rate_against_the_sign() -> None:
    omega = torch.ones(4)
    ScaleAdam(omega, NIOConfig(lr=0.01, min_scale=0.5)).step(torch.tensor([7.0, -1e-3, 0.5, 0.0]), "objective")
    torch.testing.assert_close(omega, torch.tensor([0.99, 1.01, 0.99, 1.0]), rtol=0, atol=1e-6)
