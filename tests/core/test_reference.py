"""The oracle itself, against finite differences."""

import pytest
import torch

from benchmarks.reference import joint_graph
from nio_hf.core.mode import measuring
from tests.core.cases import double_case


@pytest.mark.parametrize(
    ("objective", "branch"), [("gc", "objective"), ("gc_sum_norm", "objective"), ("gc", "constraint")]
)
def test_scale_gradients_are_the_slopes_of_the_value(objective, branch):
    made = double_case("mlp")
    weights = dict(made.model.named_parameters())
    gradient = [name for name in weights if name.endswith("weight")]
    step = 1e-6

    def evaluate():
        return joint_graph(
            made.model,
            lambda model: [made.mean_loss(window, model) for window in ([0, 1, 2], [3, 4], [5, 6, 7, 0])],
            gradient=gradient,
            scaled=list(weights),
            objective=objective,
            branch=branch,
        )

    with measuring(made.model):
        exact = evaluate().scale_gradient
        slopes = []
        for weight in weights.values():
            values = []
            for factor in (1 + step, 1 - step):
                original = weight.detach().clone()
                weight.data.mul_(factor)
                values.append(evaluate().value)
                weight.data.copy_(original)
            slopes.append((values[0] - values[1]) / (2 * step))
    torch.testing.assert_close(exact, torch.stack(slopes), rtol=1e-5, atol=1e-7)
