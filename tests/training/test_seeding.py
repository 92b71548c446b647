"""Adam's second moment, started from the squared gradient."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nio_hf import NIOTrainer
from nio_hf.core import NIOConfig, squared_gradients
from nio_hf.errors import ConfigError, DataError
from nio_hf.training.seeding import seed_second_moment
from tests.training.toys import ToyImages, arguments, build, snapshot

LR, BETA1, BETA2, EPS = 1e-2, 0.9, 0.999, 1e-8


def _mse(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def _problem() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batches = [(torch.randn(8, 3).double(), torch.randn(8, 2).double()) for _ in range(3)]
    return model, batches


def _trainer(output_dir: Path, **changes: Any) -> NIOTrainer:
    settings = {"nio": False, "nio_seed_optimizer": "gi_adam", "max_steps": 1, "learning_rate": LR, **changes}
    return NIOTrainer(build("vit"), arguments(output_dir, **settings), train_dataset=ToyImages())


def test_the_squares_are_those_of_whole_batches_whatever_the_sub_batches() -> None:
    model, batches = _problem()
    expected = [
        torch.stack(squares).mean(0)
        for squares in zip(
            *([g.square() for g in torch.autograd.grad(_mse(model, b), list(model.parameters()))] for b in batches),
            strict=True,
        )
    ]
    for sub_batches in (2, 3, 8):
        found = squared_gradients(model, batches, _mse, NIOConfig(sub_batches=sub_batches))
        assert list(found) == [name for name, _ in model.named_parameters()]
        for square, value in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(square, value, rtol=1e-12, atol=0)


def test_the_gradient_of_each_batch_is_clipped_as_in_training() -> None:
    model, batches = _problem()
    parameters = list(model.parameters())
    norms = [
        float(torch.cat([g.flatten() for g in torch.autograd.grad(_mse(model, b), parameters)]).norm()) for b in batches
    ]
    max_norm = sorted(norms)[1]
    expected = [torch.zeros_like(parameter) for parameter in parameters]
    for batch in batches:
        model.zero_grad()
        _mse(model, batch).backward()
        nn.utils.clip_grad_norm_(parameters, max_norm)
        for total, parameter in zip(expected, parameters, strict=True):
            assert parameter.grad is not None
            total += parameter.grad.square() / len(batches)
    found = squared_gradients(model, batches, _mse, NIOConfig(sub_batches=2), max_norm=max_norm)
    for square, value in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(square, value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("max_grad_norm", [-1.0, 0.0, 1e-3])
def test_a_training_that_clips_is_seeded_with_what_its_optimizer_sees(tmp_path: Path, max_grad_norm: float) -> None:
    def norm(limit: float) -> float:
        squares = _trainer(tmp_path, max_grad_norm=limit).squared_gradients(batches=1)
        return math.sqrt(sum(float(square.sum()) for square in squares.values()))

    whole = norm(1e9)
    assert whole > 1e-2
    assert math.isclose(norm(max_grad_norm), max_grad_norm if max_grad_norm > 0 else whole, rel_tol=1e-2)


def test_without_a_batch_there_is_nothing_to_seed_from() -> None:
    model, _ = _problem()
    with pytest.raises(DataError, match="none"):
        squared_gradients(model, [], _mse)


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"amsgrad": True}])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("mode", ["gi_adam", "uncorrected"])
def test_the_updates_are_those_of_the_equations(mode: Any, kind: Any, options: dict[str, Any]) -> None:
    """Three steps against the equations of the module, written out."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    model = nn.Module()
    model.register_parameter("w", parameter)
    square = torch.tensor([0.04, 1.0, 1e-6], dtype=torch.float64)
    optimizer = kind([parameter], lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=0.0, **options)
    seed_second_moment(optimizer, model, {"w": square}, mode)
    expected, first, second = parameter.detach().clone(), torch.zeros(3).double(), square.clone()
    largest = torch.zeros(3).double()
    for step, gradient in enumerate(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double(), 1):
        parameter.grad = gradient.clone()
        optimizer.step()
        first = BETA1 * first + (1 - BETA1) * gradient
        second = BETA2 * second + (1 - BETA2) * gradient**2
        largest = torch.maximum(largest, second)
        used = largest if options.get("amsgrad") else second
        corrected = mode == "gi_adam"
        m = first / (1 - BETA1**step) if corrected else first
        v = used / (1 - BETA2**step) if corrected else used
        expected = expected - LR * m / (v.sqrt() + EPS)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-7, atol=1e-10)


def test_with_the_correction_the_first_update_is_a_small_one() -> None:
    """sqrt(1 - beta2) of the learning rate where the gradient is that of the seed; without it 1 - beta1 of it."""
    sizes = {}
    for mode in ("gi_adam", "uncorrected"):
        parameter = nn.Parameter(torch.ones(1, dtype=torch.float64))
        model = nn.Module()
        model.register_parameter("w", parameter)
        optimizer = torch.optim.Adam([parameter], lr=LR)
        seed_second_moment(optimizer, model, {"w": torch.full((1,), 0.25).double()}, mode)  # type: ignore[arg-type]
        parameter.grad = torch.full((1,), 0.5).double()
        optimizer.step()
        sizes[mode] = 1 - parameter.item()
    assert math.isclose(sizes["gi_adam"], LR * math.sqrt(1 - BETA2), rel_tol=1e-5)
    assert math.isclose(sizes["uncorrected"], LR * (1 - BETA1), rel_tol=1e-5)


def test_an_optimizer_that_has_taken_steps_is_left_alone() -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.ones(1)
    optimizer.step()
    model = nn.Module()
    model.register_parameter("w", parameter)
    with pytest.raises(ConfigError, match="has a state already"):
        seed_second_moment(optimizer, model, {"w": torch.ones(1)}, "gi_adam")


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("nio", [False, True])
def test_a_training_starts_from_the_squares_at_its_initialisation(tmp_path: Path, optim: str, nio: bool) -> None:
    trainer = _trainer(tmp_path, optim=optim, nio=nio, nio_seed_optimizer="uncorrected", learning_rate=0.0)
    trainer.train()
    inner: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    states = {id(parameter): state for parameter, state in inner.state.items()}
    squares = trainer.squared_gradients()
    for name, parameter in trainer.model.named_parameters():
        seeded = states[id(parameter)]["exp_avg_sq"]
        # One step of training has been mixed in, with a weight of 1 - beta2.
        own = squares[name] * BETA2
        assert (seeded >= own * (1 - 1e-5)).all()
    total = sum(float(square.sum()) for square in squares.values())
    assert total > 0


def test_the_random_numbers_of_the_training_are_those_without_it(tmp_path: Path) -> None:
    losses = []
    for mode in (None, "gi_adam"):
        trainer = _trainer(tmp_path / str(mode), nio_seed_optimizer=mode, logging_steps=1)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "rmsprop"])
def test_other_optimizers_are_refused_before_nio_runs(tmp_path: Path, optim: str) -> None:
    trainer = _trainer(tmp_path, optim=optim, nio=True)
    before = snapshot(trainer.model)
    with pytest.raises(ConfigError, match="nio_seed_optimizer: given with"):
        trainer.train()
    assert trainer.nio_result is None
    assert all(torch.equal(value, before[name]) for name, value in snapshot(trainer.model).items())


def test_an_unknown_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nio_seed_optimizer: 'yes'"):
        arguments(tmp_path, nio_seed_optimizer="yes")


def test_a_resumed_training_goes_on_with_its_own_second_moment(tmp_path: Path) -> None:
    whole = _trainer(tmp_path / "whole", max_steps=4, save_strategy="steps", save_steps=2)
    whole.train()
    part = _trainer(tmp_path / "part", max_steps=4, save_strategy="steps", save_steps=2)
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = snapshot(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in snapshot(part.model).items())
