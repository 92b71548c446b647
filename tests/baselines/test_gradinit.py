"""The gradient of the scales against plain autograd through omega, and the iterations around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nio_hf.baselines import gradinit
from nio_hf.baselines.gradinit import shared_halves
from nio_hf.core import NIOConfig, loop
from nio_hf.core.loop import iteration_seed
from nio_hf.core.mode import measuring
from nio_hf.core.scales import LayerScales
from nio_hf.errors import NumericsError
from tests.core.cases import Case, batches_of, case, double_case

CONFIG: dict[str, Any] = {"iterations": 2, "sub_batches": 2, "seed": 3}
BRANCHES = {"objective": {"gamma_relative": None}, "constraint": {"gamma": 1e-9}}
ETA = 0.05


class Oracle(nn.Module):
    """dJ/domega by one graph over the gradient, the step and the loss after it, written as plainly as possible."""

    def __init__(self, made: Case, omega: Tensor) -> None:
        super().__init__()
        self.model, self._loss_fn = made.model, made.loss_fn
        scales = LayerScales(made.model)
        weights = dict(made.model.named_parameters())
        scaled = [name for name, weight in weights.items() if any(weight is tensor for tensor in scales.scaled)]
        self._omega = omega.clone().requires_grad_()
        self._theta = dict(weights)
        self._theta.update({name: o * weights[name] for name, o in zip(scaled, self._omega, strict=True)})
        self._moved = [n for n, weight in weights.items() if any(weight is tensor for tensor in scales.trainable)]

    def forward(self, batch: Any) -> Tensor:
        returned = self._loss_fn(self.model, batch)
        return returned[0] / returned[1] if isinstance(returned, tuple) else returned

    def loss(self, theta: dict[str, Tensor], batch: Any) -> Tensor:
        return torch.func.functional_call(self, {f"model.{name}": t for name, t in theta.items()}, (batch,))

    def gradient(self, optimizer: str, branch: str, part: Any, other: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(gradient of omega, value, ||g||_p)."""
        wrt = [self._theta[name] for name in self._moved]
        g = dict(
            zip(self._moved, torch.autograd.grad(self.loss(self._theta, part), wrt, create_graph=True), strict=True)
        )
        flat = torch.cat([each.flatten() for each in g.values()])
        grad_norm = flat.abs().sum() if optimizer == "adam" else flat.square().sum().sqrt()
        if branch == "constraint":
            return torch.autograd.grad(grad_norm, self._omega)[0], grad_norm, grad_norm
        step = {name: each.sign().detach() if optimizer == "adam" else each for name, each in g.items()}
        after = {name: t - ETA * step[name] if name in step else t for name, t in self._theta.items()}
        value = self.loss(after, other)
        return torch.autograd.grad(value, self._omega)[0], value, grad_norm


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("name", ["mlp", "vit", "resnet", "gpt2"])
def test_the_gradient_of_the_scales_is_that_of_the_oracle(
    name: str, optimizer: Any, branch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compare(name, optimizer, branch, monkeypatch, 1e-10)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"curvature": "exact_kept"}, 1e-10),
        ({"curvature": "exact", "micro_batch_size": 2}, 1e-10),
        ({"curvature": "finite_difference"}, 1e-5),
    ],
)
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_all_paths_give_the_gradient_of_the_oracle(
    optimizer: Any, branch: str, settings: Any, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compare("vit", optimizer, branch, monkeypatch, tolerance, **settings)


def _compare(
    name: str, optimizer: Any, branch: str, monkeypatch: pytest.MonkeyPatch, tolerance: float, **settings: Any
) -> None:
    made, (held_out, *batches) = double_case(name), batches_of(name, 3)
    seen: list[tuple[Tensor, Tensor]] = []

    def step(adam: Any, scale_gradient: Tensor, of: str) -> None:
        assert of == branch
        seen.append((adam.omega.clone(), scale_gradient.clone()))
        adam.omega.copy_(torch.linspace(0.7, 1.4, adam.omega.numel(), dtype=adam.omega.dtype))

    monkeypatch.setattr(loop.ScaleAdam, "step", step)
    oracle_model = double_case(name)
    config = NIOConfig(**{**CONFIG, "curvature": "exact", **BRANCHES[branch], **settings})
    result = gradinit(made.model, batches, made.loss_fn, config, holdout=[held_out], optimizer=optimizer, step_size=ETA)
    for number, (record, (omega, found)) in enumerate(zip(result.history, seen, strict=True), 1):
        halves = shared_halves(batches[number - 1], iteration_seed(3, number))
        with measuring(oracle_model.model):
            expected, value, grad_norm = Oracle(oracle_model, omega).gradient(optimizer, branch, *halves)
        scale = expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)
        assert record.grad_norm == pytest.approx(grad_norm.item(), rel=1e-10)
        assert record.branch == branch
        assert record.objective == (None if branch == "constraint" else pytest.approx(value.item(), rel=1e-10))
    assert seen[0][0].eq(1).all()
    assert not seen[1][0].eq(1).any()


@pytest.mark.parametrize(("samples", "third"), [(2, 1), (3, 1), (8, 3), (9, 3), (64, 21)])
def test_the_parts_share_half_of_their_samples(samples: int, third: int) -> None:
    part, other = shared_halves(torch.arange(samples), seed=5)
    assert len(part) == len(other) == samples - third
    assert len(set(part.tolist()) & set(other.tolist())) == samples - 2 * third
    assert set(part.tolist()) | set(other.tolist()) == set(range(samples))
    assert samples < 8 or not torch.equal(part, shared_halves(torch.arange(samples), seed=6)[0])


def test_the_bound_is_relative_to_the_first_norm() -> None:
    made = case("mlp")
    config = NIOConfig(**CONFIG, gamma_relative=1.5)
    result = gradinit(made.model, batches_of("mlp", 6), made.loss_fn, config)
    assert result.gamma == pytest.approx(1.5 * result.history[0].grad_norm)
    assert result.before.grad_norm < result.history[0].grad_norm / 2, "p is 1, not 2"


def test_the_norm_is_lowered_above_gamma_only() -> None:
    made, data = case("mlp"), batches_of("mlp", 5)
    config = NIOConfig(**{**CONFIG, "iterations": 40}, gamma_relative=0.5, lr=0.03)
    result = gradinit(made.model, data, made.loss_fn, config)
    assert {record.branch for record in result.history} == {"constraint", "objective"}
    for record in result.history:
        assert record.branch == ("constraint" if record.grad_norm > result.gamma else "objective")
        assert (record.objective is None) == (record.branch == "constraint")
    assert result.after.grad_norm < result.before.grad_norm


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_loss_after_a_step_falls(optimizer: Any) -> None:
    made = case("mlp")
    batch = batches_of("mlp", 1, samples=32)
    config = NIOConfig(**{**CONFIG, "iterations": 60}, gamma_relative=None, lr=0.05)
    result = gradinit(made.model, batch, made.loss_fn, config, holdout=batch, optimizer=optimizer)
    assert result.after.loss < result.before.loss - 0.05
    assert result.options == {"optimizer": optimizer, "step_size": {"adam": 0.001, "sgd": 0.1}[optimizer]}


def test_a_step_that_is_far_too_long_is_named() -> None:
    made = case("mlp")

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return made.loss_fn(model, batch) + model.get_parameter("0.weight").square().sum().pow(9)

    with pytest.raises(NumericsError, match=r"GradInit iteration 1: the loss after the step is .*Lower step_size"):
        gradinit(made.model, batches_of("mlp", 6), loss_fn, NIOConfig(**CONFIG), step_size=1e30)
