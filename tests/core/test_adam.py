"""Adam on a vector of scales against steps computed by hand."""

import copy

import pytest
import torch

from nio_hf.core.adam import AdamState, adam_step
from tests.core.cases import AdamByHand

STEPS = [
    ("objective", [0.3, -5.0, 1e-4]),
    ("objective", [-0.7, -0.2, 2e-4]),
    ("constraint", [0.9, -3.0, -0.5]),
    ("objective", [0.1, -1.0, 0.0]),
    ("constraint", [2.0, -0.4, -0.5]),
    ("constraint", [0.6, -0.9, -0.5]),
    ("objective", [0.8, -0.9, -0.5]),
]


def test_interleaved_branches_follow_the_steps_computed_by_hand():
    state, scales = AdamState.zeros(3), [AdamByHand() for _ in range(3)]
    for branch, gradient in STEPS:
        # The gradient reaches the step in single precision.
        single = torch.tensor(gradient)
        before = copy.deepcopy(state)
        direction, following = adam_step(state, single, branch)
        expected = [scale.direction(slope, branch) for scale, slope in zip(scales, single.tolist(), strict=True)]
        assert direction.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert state == before, "a step leaves the state that it is given"
        state = following
    assert state.steps == {"objective": 4, "constraint": 3}
