"""The gradient quotient where it is known in closed form, and the steps on the norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nio_hf.baselines import METHODS, metainit
from nio_hf.baselines.metainit import differentiate_quotient, gradient_quotient
from nio_hf.core import InitResult, NIOConfig, initialize
from nio_hf.core.mode import measuring
from nio_hf.errors import ConfigError, ModelError, NumericsError
from tests import zoo
from tests.core.cases import batches_of, case, double_case

EPSILON = 1e-5
CONFIG = NIOConfig(sub_batches=2, report_batches=1)


def run(
    model: nn.Module, batches: Any, loss_fn: Any, config: NIOConfig = CONFIG, *, report: Any = None, **options: Any
) -> InitResult:
    options = {"iterations": 2, "lr": 0.01, **options}
    return initialize(model, batches, loss_fn, config, method=METHODS["metainit"], options=options, report=report)


def quotient_of(loss: Tensor, weights: list[Any], epsilon: float = EPSILON) -> Tensor:
    return gradient_quotient(torch.autograd.grad(loss, weights, create_graph=True), weights, epsilon)


def test_quotient_of_a_quadratic_is_the_mean_curvature() -> None:
    curvatures = torch.tensor([[3.0, -2.0], [0.5, 4.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 2.0], [-3.0, -0.5]], dtype=torch.float64, requires_grad=True)
    loss = (curvatures * weight.square()).sum() / 2
    # g = a w and H g = a^2 w, so |H g / g| = |a|; with epsilon it is |a^2 w + eps_g| / |a w + eps_g|.
    assert quotient_of(loss, [weight], 1e-12).item() == pytest.approx((3 + 2 + 0.5 + 4) / 4)
    g = curvatures * weight.detach()
    eps = 0.1 * (2 * (g >= 0).double() - 1)
    expected = ((curvatures * g + eps) / (g + eps)).abs().mean()
    assert quotient_of(loss, [weight], 0.1).item() == pytest.approx(expected.item())


def test_quotient_is_a_mean_over_all_tensors_together() -> None:
    one, two = (torch.full(shape, 2.0, requires_grad=True) for shape in ((1,), (3,)))
    assert quotient_of(5 * one.square().sum() / 2 + two.square().sum() / 2, [one, two]).item() == pytest.approx(
        (5 + 3 * 1) / 4, rel=1e-4
    )


def test_quotient_has_a_derivative_through_gradient_and_product() -> None:
    weight = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    # g = w^3, H g = 3 w^5: the quotient is mean(3 w^2), its derivative 2 w.
    quotient = quotient_of(weight.pow(4).sum() / 4, [weight], 1e-14)
    assert quotient.item() == pytest.approx(5.25)
    torch.testing.assert_close(torch.autograd.grad(quotient, weight)[0], 2 * weight.detach())


def test_entries_without_gradient_count_as_one() -> None:
    weight = torch.tensor([1.0, 0.0], requires_grad=True)
    assert quotient_of(weight.square().sum(), [weight]).item() == pytest.approx((2 + 1) / 2, rel=1e-4)


@pytest.mark.parametrize("name", ["mlp", *zoo.VISION, *zoo.TEXT])
def test_derivatives_by_the_norms_are_the_slopes_of_the_quotient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slopes need second derivatives only, so they show whether torch has the third ones right."""
    made, batch = double_case(name), batches_of(name, 1)
    seen: list[Any] = []

    def spy(loss: Any, batch: Any, weights: Any, *args: Any, **settings: Any) -> Any:
        found = differentiate_quotient(loss, batch, weights, *args, **settings)
        seen.append((weights, found[0]))
        return found

    monkeypatch.setattr(metainit, "differentiate_quotient", spy)
    values = {name: value.detach().clone() for name, value in made.model.named_parameters()}
    result = run(made.model, batch, made.loss_fn, report=batch, iterations=1, epsilon=1e-3)
    [(weights, by_norm)] = seen
    assert len(weights) > 2
    with torch.no_grad():
        for parameter, value in values.items():
            made.model.get_parameter(parameter).copy_(value)

    def value() -> float:
        returned = made.loss_fn(made.model, batch[0])
        return quotient_of(returned[0] / returned[1] if isinstance(returned, tuple) else returned, weights, 1e-3).item()

    with measuring(made.model):
        assert result.history[0].objective == pytest.approx(value(), rel=1e-10)
        for weight, derivative in zip(weights, by_norm.tolist(), strict=True):
            original, length = weight.detach().clone(), weight.detach().norm()
            around = []
            for step in (1e-7, -1e-7):
                weight.data.copy_(original * (1 + step / length))
                around.append(value())
            weight.data.copy_(original)
            assert derivative == pytest.approx((around[0] - around[1]) / 2e-7, rel=1e-3, abs=1e-5)


def test_norms_take_steps_of_sign_sgd_with_momentum() -> None:
    made = case("mlp")

    def quartic(model: nn.Module, batch: Any) -> Tensor:
        return sum(p.pow(4).sum() for p in model.parameters()) / 4

    start = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    result = run(made.model, batches_of("mlp", 3), quartic, momentum=0.8, epsilon=1e-12)
    weights = [name for name, p in start.items() if p.ndim > 1]
    for name, before in start.items():
        if not before.any():
            continue
        after = made.model.get_parameter(name).detach()
        # The derivatives are positive, so the norm falls by lr, then by (1 + momentum) lr.
        fall = 0.01 + 1.8 * 0.01 if name in weights else 0
        assert after.norm().item() == pytest.approx(before.norm().item() - fall, abs=1e-6)
        torch.testing.assert_close(after / after.norm(), before / before.norm())
    numbers = torch.cat([start[name].flatten() for name in weights])
    assert result.history[0].objective == pytest.approx(3 * numbers.square().mean().item(), rel=1e-4)
    assert result.history[0].grad_norm == pytest.approx(numbers.pow(3).norm().item(), rel=1e-4)


def test_norms_stay_within_their_bounds() -> None:
    made = case("mlp")
    result = run(made.model, batches_of("mlp", 5), made.loss_fn, iterations=30, lr=0.5, scale_range=(0.8, 1.25))
    changed = [omega for name, omega in result.scales.items() if name.endswith("weight") and name != "1.weight"]
    assert all(omega == pytest.approx(0.8) or omega == pytest.approx(1.25) for omega in changed)


def test_the_quotient_falls() -> None:
    made = case("mlp")
    batch = batches_of("mlp", 1, samples=32)
    result = run(made.model, batch, made.loss_fn, report=batch, iterations=60, lr=0.003)
    assert result.history[-1].objective < 0.7 * result.history[0].objective


def test_micro_batches_are_refused() -> None:
    made = case("mlp")
    with pytest.raises(ConfigError, match=r"NIOConfig\.micro_batch_size: 2\. .*MetaInit"):
        run(
            made.model,
            batches_of("mlp", 3),
            made.loss_fn,
            NIOConfig(sub_batches=2, report_batches=1, micro_batch_size=2),
        )


def test_an_infinite_quotient_is_named() -> None:
    made = case("mlp")

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        # 0 to the power of 1.5: its slope is 0, its curvature infinite.
        return made.loss_fn(model, batch) + (model.get_parameter("4.weight") * 0).sum().abs().pow(1.5)

    with pytest.raises(NumericsError, match=r"MetaInit iteration 1: the gradient quotient is nan"):
        run(made.model, batches_of("mlp", 3), loss_fn)


def test_an_operation_without_derivative_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case("mlp")

    def refuse(*args: Any) -> Any:
        raise RuntimeError("derivative for aten::some_kernel_backward is not implemented")

    monkeypatch.setattr(metainit, "gradient_quotient", refuse)
    with pytest.raises(ModelError, match=r"MetaInit iteration 1: .*some_kernel.*differentiates three times"):
        run(made.model, batches_of("mlp", 3), made.loss_fn)
