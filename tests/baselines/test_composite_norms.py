"""Normalisation in elementary operations gives what torch's own does, and derivatives that hold to third order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nio_hf.baselines.composite_norms import CompositeNorms


def _evaluating(layer: nn.Module) -> nn.Module:
    layer(torch.randn(4, 6, 5, dtype=torch.float64))
    return layer.eval()


LAYERS = {
    "layer": nn.LayerNorm(5),
    "layer over two": nn.LayerNorm((6, 5), eps=0.1),
    "layer without affine": nn.LayerNorm(5, elementwise_affine=False),
    "rms": nn.RMSNorm(5, eps=0.1),
    "rms with eps of the dtype": nn.RMSNorm((6, 5)),
    "batch": nn.BatchNorm1d(6),
    "batch, evaluating": _evaluating(nn.BatchNorm1d(6, eps=0.1).double()),
    "batch without affine": nn.BatchNorm1d(6, affine=False, track_running_stats=False),
    "instance": nn.InstanceNorm1d(6, affine=True),
    "instance, evaluating": _evaluating(nn.InstanceNorm1d(6, track_running_stats=True).double()),
    "group": nn.GroupNorm(2, 6),
}


@pytest.mark.parametrize("name", LAYERS)
def test_values_are_those_of_torch(name: str) -> None:
    layer, inputs = LAYERS[name].double(), torch.randn(4, 6, 5, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    expected = layer(inputs)
    with CompositeNorms():
        torch.testing.assert_close(layer(inputs), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_third_derivatives_are_the_slopes_of_second_ones(name: str) -> None:
    layer = LAYERS[name].double()
    inputs, direction = (torch.randn(3, 6, 5, dtype=torch.float64) for _ in range(2))

    def second(step: float) -> Tensor:
        """Second derivative along the direction, where the inputs have gone a step along it."""
        t = torch.tensor(step, dtype=torch.float64, requires_grad=True)
        with CompositeNorms():
            value = layer(inputs + t * direction).pow(4).sum()
            first = torch.autograd.grad(value, t, create_graph=True)[0]
            return torch.autograd.grad(first, t, create_graph=True)[0]

    def third() -> Tensor:
        t = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
        with CompositeNorms():
            derivative = layer(inputs + t * direction).pow(4).sum()
            for _ in range(3):
                derivative = torch.autograd.grad(derivative, t, create_graph=True)[0]
        return derivative.detach()

    slope = (second(1e-6) - second(-1e-6)) / 2e-6
    torch.testing.assert_close(third(), slope.detach(), rtol=1e-5, atol=1e-5)
