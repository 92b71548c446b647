"""The gradient of the scales against plain autograd through omega, and the iterations around it."""

import dataclasses

import pytest
import torch
from torch import nn

from nio_hf.baselines import METHODS, gradinit
from nio_hf.baselines.gradinit import shared_halves
from nio_hf.core import NIOConfig, curvature, find_tensors, initialize
from nio_hf.core.mode import measuring
from nio_hf.core.problem import seed_of
from nio_hf.errors import NumericsError, StoppedError
from tests.core.cases import batches_of, case, differences, double_case, state

CONFIG = NIOConfig(sub_batches=2, seed=3)
BRANCHES = {"objective": {"gamma_relative": None}, "constraint": {"gamma": 1e-9}}
OUTCOMES = {"objective": "accepted", "constraint": "lower_norm"}
ETA = 0.05


def run(made, batches, config=CONFIG, *, report=None, **options):
    method, options = METHODS["gradinit"], {"iterations": 2, **options}
    return initialize(made.model, batches, made.loss_fn, config, method=method, options=options, report=report)


class Oracle(nn.Module):
    """dJ/domega by one graph over the gradient, the step and the loss after it, written as plainly as possible."""

    def __init__(self, made, omega):
        super().__init__()
        self.model, self._loss_fn = made.model, made.loss_fn
        tensors = find_tensors(made.model)
        weights = dict(made.model.named_parameters())
        scaled = [place.name for place in tensors.scaled]
        self._omega = omega.clone().requires_grad_()
        self._theta = dict(weights)
        self._theta.update({name: o * weights[name] for name, o in zip(scaled, self._omega, strict=True)})
        moved = {id(place.parameter) for place in tensors.trainable}
        self._moved = [name for name, weight in weights.items() if id(weight) in moved]

    def forward(self, batch):
        returned = self._loss_fn(self.model, batch)
        return returned[0] / returned[1] if isinstance(returned, tuple) else returned

    def loss(self, theta, batch):
        return torch.func.functional_call(self, {f"model.{name}": t for name, t in theta.items()}, (batch,))

    def gradient(self, optimizer, branch, part, other):
        """(gradient of omega, value, ||g||_p)."""
        wrt = [self._theta[name] for name in self._moved]
        gradient = torch.autograd.grad(self.loss(self._theta, part), wrt, create_graph=True)
        g = dict(zip(self._moved, gradient, strict=True))
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
def test_the_gradient_of_the_scales_is_that_of_the_oracle(name, optimizer, branch, monkeypatch):
    _compare(name, optimizer, branch, monkeypatch, 1e-10, curvature="exact")


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"curvature": "auto"}, 1e-10),
        ({"curvature": "exact", "micro_batch_size": 2}, 1e-10),
        ({"curvature": "finite_difference"}, 1e-5),
    ],
)
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_all_paths_give_the_gradient_of_the_oracle(optimizer, branch, kept, settings, tolerance, monkeypatch):
    monkeypatch.setattr(curvature, "available_memory", lambda device: 2**40 if kept else None)
    result = _compare("vit", optimizer, branch, monkeypatch, tolerance, **settings)
    # The first product keeps nothing: it is where the path is chosen.
    products = [3, 2 if kept and "micro_batch_size" not in settings else 3]
    passes = {"constraint": [1 + steps for steps in products], "objective": [2 + steps for steps in products]}
    if optimizer == "adam":
        passes["objective"] = [2, 2]
    assert [record.cost for record in result.history] == [steps * 5 / 8 for steps in passes[branch]]


def _compare(name, optimizer, branch, monkeypatch, tolerance, **settings):
    made, (reported, *batches) = double_case(name), batches_of(name, 3)
    before, found = [], []

    def adam_step(adam, by_scale, of):
        assert of == branch
        found.append(by_scale.clone())
        return torch.zeros_like(by_scale), adam

    def moved(scales, changes, scale_range):
        before.append(scales)
        return tuple(torch.linspace(0.7, 1.4, len(scales), dtype=torch.float64).tolist())

    monkeypatch.setattr(gradinit, "adam_step", adam_step)
    monkeypatch.setattr(gradinit, "moved", moved)
    oracle_model = double_case(name)
    config = NIOConfig(sub_batches=2, seed=3, **settings)
    options = {"optimizer": optimizer, "step_size": ETA, **BRANCHES[branch]}
    result = run(made, batches, config, report=[reported], **options)
    for number, (record, scales, by_scale) in enumerate(zip(result.history, before, found, strict=True), 1):
        halves = shared_halves(batches[number - 1], seed_of(3, number))
        with measuring(oracle_model.model):
            omega = torch.tensor(scales, dtype=torch.float64)
            expected, value, grad_norm = Oracle(oracle_model, omega).gradient(optimizer, branch, *halves)
        scale = expected.abs().max().item()
        torch.testing.assert_close(by_scale, expected, rtol=tolerance, atol=tolerance * scale)
        assert record.grad_norm == pytest.approx(grad_norm.item(), rel=1e-10)
        assert record.outcome == OUTCOMES[branch]
        assert record.objective == (None if branch == "constraint" else pytest.approx(value.item(), rel=1e-10))
    assert set(before[0]) == {1.0}
    assert 1.0 not in before[1]
    return result


@pytest.mark.parametrize(("samples", "third"), [(2, 1), (3, 1), (8, 3), (9, 3), (64, 21)])
def test_the_parts_share_half_of_their_samples(samples, third):
    part, other = shared_halves(torch.arange(samples), seed=5)
    assert len(part) == len(other) == samples - third
    assert len(set(part.tolist()) & set(other.tolist())) == samples - 2 * third
    assert set(part.tolist()) | set(other.tolist()) == set(range(samples))
    assert samples < 8 or not torch.equal(part, shared_halves(torch.arange(samples), seed=6)[0])


def test_the_norm_is_lowered_above_gamma_only_which_is_relative_to_the_first_one():
    relative = run(case("mlp"), batches_of("mlp", 6), iterations=40, lr=0.03, gamma_relative=0.9)
    first = relative.history[0].grad_norm
    absolute = run(case("mlp"), batches_of("mlp", 6), iterations=40, lr=0.03, gamma=0.9 * first, gamma_relative=2.0)
    assert {record.outcome for record in relative.history} == {"lower_norm", "accepted"}
    for mine, other in zip(relative.history, absolute.history, strict=True):
        assert dataclasses.replace(mine, seconds=0.0) == dataclasses.replace(other, seconds=0.0)
        assert mine.outcome == ("lower_norm" if mine.grad_norm > 0.9 * first else "accepted")
        assert (mine.objective is None) == (mine.outcome == "lower_norm")
    assert relative.after.grad_norm < relative.before.grad_norm
    assert relative.before.grad_norm < first / 2, "p is 1, not 2"


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_loss_after_a_step_falls(optimizer):
    batch = batches_of("mlp", 1, samples=32)
    options = {"iterations": 60, "gamma_relative": None, "lr": 0.05, "optimizer": optimizer}
    result = run(case("mlp"), batch, report=batch, **options)
    assert result.after.loss < result.before.loss - 0.05
    assert result.options == {**METHODS["gradinit"].options, **options}
    same = run(case("mlp"), batch, report=batch, **options, step_size={"adam": 0.001, "sgd": 0.1}[optimizer])
    assert same.scales == result.scales


def test_it_stops_where_that_is_asked_for():
    seen = []
    made = case("mlp")
    before = state(made.model)
    task = (made.model, batches_of("mlp", 12), made.loss_fn, NIOConfig(sub_batches=2, report_batches=1))
    with pytest.raises(StoppedError):
        initialize(*task, method=METHODS["gradinit"], on_iteration=seen.append, should_stop=lambda: len(seen) == 2)
    assert len(seen) == 2
    assert differences(before, state(made.model)) == []


def test_scales_stay_within_their_range():
    options = {"iterations": 30, "lr": 0.5, "scale_range": [0.8, 1.25]}
    result = run(case("mlp"), batches_of("mlp", 5), **options)
    assert result.options["scale_range"] == (0.8, 1.25)
    assert {min(result.scales.values()), max(result.scales.values())} == {0.8, 1.25}


def test_a_step_that_is_far_too_long_is_named():
    made = case("mlp")

    def loss_fn(model, batch):
        return made.loss_fn(model, batch) + model.get_parameter("0.weight").square().sum().pow(9)

    steep = dataclasses.replace(made, loss_fn=loss_fn)
    found = r"GradInit iteration 1: the loss after the step is .*Lower gradinit\.step_size"
    with pytest.raises(NumericsError, match=found):
        run(steep, batches_of("mlp", 6), step_size=1e30)
