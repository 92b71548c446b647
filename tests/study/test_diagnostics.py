"""Diagnostics of a step, compared with numbers worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nio_hf.study.diagnostics import FIRST_STEPS, StepDiagnostics


class Scaled(nn.Module):
    """Logits W x, beside a matrix that is zero at the start and a vector."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        self.zero = nn.Parameter(torch.zeros(2, 2))
        self.vector = nn.Parameter(torch.ones(2))

    def forward(self, pixel_values):
        return SimpleNamespace(logits=pixel_values @ self.weight.T)


def _step(looked_at, number=1):
    looked_at.on_step_end(None, SimpleNamespace(global_step=number), None)


@pytest.mark.parametrize(("factor", "angle"), [(1.1, 0.0), (1.0, 1e-3), (1.0, 0.5), (1.0, math.pi / 2)])
def test_a_weight_that_is_longer_or_turned(factor, angle):
    model = Scaled()
    looked_at = StepDiagnostics(model, {"pixel_values": torch.eye(2)})
    looked_at.on_train_begin(None, None, None)
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    with torch.no_grad():
        model.weight.copy_(factor * model.weight @ turn)
        model.zero.fill_(1.0)
    _step(looked_at)
    moved = 2 * math.sin(angle / 2) if angle else factor - 1
    assert looked_at.values["angular_update"] == [pytest.approx(angle, rel=1e-2, abs=1e-3 if angle == 0 else 0)]
    assert looked_at.values["relative_update"] == [pytest.approx(moved, rel=1e-2)]
    assert looked_at.values["output_change"] == [pytest.approx(moved, rel=1e-2)]


def test_only_the_first_steps_are_looked_at():
    looked_at = StepDiagnostics(Scaled(), {"pixel_values": torch.eye(2)})
    looked_at.on_train_begin(None, None, None)
    for number in range(1, FIRST_STEPS + 3):
        _step(looked_at, number)
    assert {len(values) for values in looked_at.values.values()} == {FIRST_STEPS}
