"""Adam on a vector of scales against steps computed by hand."""

import dataclasses
import json
import math

import pytest
import torch

from nio_hf.core.adam import AdamState, adam_step
from nio_hf.core.records import restored

STEPS = [
    ("objective", [0.3, -5.0, 1e-4]),
    ("objective", [-0.7, -0.2, 2e-4]),
    ("constraint", [0.9, -3.0, -0.5]),
    ("objective", [0.1, -1.0, 0.0]),
    ("constraint", [2.0, -0.4, -0.5]),
    ("constraint", [0.6, -0.9, -0.5]),
    ("objective", [0.8, -0.9, -0.5]),
]


class ByHand:
    """The moments of one scale in plain numbers."""

    def __init__(self):
        self.second = 0.0
        self.first = {"objective": 0.0, "constraint": 0.0}
        self.steps = {"objective": 0, "constraint": 0}

    def direction(self, gradient, branch):
        clipped = max(-1.0, min(1.0, gradient))
        self.steps[branch] += 1
        self.first[branch] = 0.9 * self.first[branch] + 0.1 * clipped
        self.second = 0.999 * self.second + 0.001 * clipped**2
        mean = self.first[branch] / (1 - 0.9 ** self.steps[branch])
        square = self.second / (1 - 0.999 ** sum(self.steps.values()))
        return -mean / (math.sqrt(square) + 1e-8)


def test_interleaved_branches_follow_the_steps_computed_by_hand():
    state, scales = AdamState.zeros(3), [ByHand() for _ in range(3)]
    for branch, gradient in STEPS:
        direction, state = adam_step(state, torch.tensor(gradient), branch)
        # The gradient reaches the step in single precision.
        expected = [scale.direction(float(g), branch) for scale, g in zip(scales, torch.tensor(gradient), strict=True)]
        assert direction.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert state.steps == {"objective": 4, "constraint": 3}


def test_the_first_direction_is_against_the_sign():
    direction, _ = adam_step(AdamState.zeros(4), torch.tensor([7.0, -1e-3, 0.5, 0.0]))
    torch.testing.assert_close(direction, torch.tensor([-1.0, 1.0, -1.0, 0.0]).double(), rtol=0, atol=2e-5)


def test_a_step_leaves_the_state_that_it_is_given():
    before = AdamState.zeros(2)
    adam_step(before, torch.ones(2))
    assert before == AdamState.zeros(2)


def test_a_state_goes_on_exactly_after_a_trip_through_json():
    state = AdamState.zeros(3)
    for branch, gradient in STEPS[:4]:
        _, state = adam_step(state, torch.tensor(gradient), branch)
    again = restored(AdamState, json.loads(json.dumps(dataclasses.asdict(state))))
    assert again == state
    branch, gradient = STEPS[4]
    assert adam_step(again, torch.tensor(gradient), branch)[0].equal(
        adam_step(state, torch.tensor(gradient), branch)[0]
    )
