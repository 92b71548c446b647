"""NIO on real images: it raises the agreement of gradients under the bound on their norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import set_seed

from nio_hf import NIOConfig, NIOResult, initialize
from nio_hf.core import NIOState, Resumption
from tests import zoo
from tests.core.cases import PER_TENSOR

BATCH = 64


def digits(seed: int) -> list[tuple[Tensor, Tensor]]:
    """The handwritten digits in whole batches, shuffled."""
    found = load_digits()
    images, labels = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return [(images[part], labels[part]) for part in order.split(BATCH) if len(part) == BATCH]


def run(seed: int, resumption: Resumption | None = None, **settings: Any) -> NIOResult:
    set_seed(seed)
    layers = [nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)]
    config = NIOConfig(**{**PER_TENSOR, "iterations": 100, "holdout_batches": 8, "seed": seed, "lr": 0.01, **settings})
    return initialize(nn.Sequential(*layers), digits(seed), zoo.vector_loss, config, resumption=resumption)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_of_held_out_digits_agree_more_under_the_bound(seed: int) -> None:
    result = run(seed, gamma_relative=1.5)
    branches = {record.branch for record in result.history}
    assert branches == {"objective", "constraint"}
    assert result.gain > 2 * result.gain_standard_error > 0
    assert result.after.grad_norm < 1.1 * result.gamma
    assert result.after.loss < 1.05 * result.before.loss
    assert result.status == "improved"


def test_without_a_bound_the_gradient_norm_of_digits_runs_away() -> None:
    result = run(0, gamma_relative=None, iterations=200)
    assert {record.branch for record in result.history} == {"objective"}
    assert result.after.grad_norm > 2.5 * result.before.grad_norm
    assert result.status == "collapse_suspected"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_iterations_end_where_the_loss_of_digits_has_risen(seed: int) -> None:
    result = run(seed, gamma_relative=None, iterations=200, max_loss_rise=0.1)
    assert 10 < len(result.history) < 200
    assert 1.05 * result.before.loss < result.after.loss < 1.2 * result.before.loss
    assert result.status == "improved"
    assert f"ended after {len(result.history)} of 200 iterations: the loss of a batch had risen by 1" in result.message


@pytest.mark.parametrize("every", [3, 1000])
def test_a_run_that_the_loss_has_ended_ends_there_again(every: int) -> None:
    settings: dict[str, Any] = {"gamma_relative": None, "max_loss_rise": 0.1, "lr": 0.05}
    states: list[NIOState] = []
    whole = run(0, Resumption(save=states.append, every=every), **settings)
    again = run(0, Resumption(state=states[0]), **settings)
    last = run(0, Resumption(state=states[-1]), **settings)
    assert len(whole.history) < 100
    assert states[-1].iterations == len(whole.history)
    assert whole.scales == again.scales == last.scales
    assert whole.message == again.message == last.message


def test_the_constraint_alone_lowers_the_gradient_norm_of_digits() -> None:
    result = run(0, gamma_relative=0.5, iterations=50)
    assert {record.branch for record in result.history[:10]} == {"constraint"}
    assert result.after.grad_norm < 0.75 * result.before.grad_norm


def test_the_variance_of_the_gradients_of_digits_falls() -> None:
    def variance(part: Any) -> float:
        # (1 / D) sum ||g_d - mean g||^2 for gradients of about one norm.
        return float(part.grad_norm**2 * (1 - 1 / part.sub_batches) * (1 - part.value))

    result = run(0, objective="variance", gamma_relative=None, iterations=30)
    assert variance(result.after) < 0.7 * variance(result.before)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_batch_that_is_harder_than_others_does_not_end_the_run(seed: int) -> None:
    """With a loss that is as noisy as a squared error, and scales that stay where they are."""

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        inputs, labels = batch
        return (model(inputs)[:, 0] - (labels % 3 == 0) * labels**2).square().mean()

    set_seed(seed)
    config = NIOConfig(iterations=20, lr=1e-6, holdout_batches=2, seed=seed)
    losses = [loss_fn(nn.Linear(64, 10), batch).item() for batch in digits(seed)]
    assert max(losses) > 1.2 * min(losses)
    result = initialize(nn.Sequential(nn.Linear(64, 10)), digits(seed), loss_fn, config)
    assert len(result.history) == 20
    assert max(record.loss for record in result.history) > 1.1 * result.before.loss
