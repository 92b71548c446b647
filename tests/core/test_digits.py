"""NIO on real images: what the published search learns holds on batches that it has not seen, and bounds hold."""

import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import set_seed

from nio_hf import NIOConfig, initialize
from tests import zoo
from tests.core.cases import PER_TENSOR

BATCH = 64


def digits(seed):
    """The handwritten digits in whole batches, shuffled."""
    found = load_digits()
    images, labels = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return [(images[part], labels[part]) for part in order.split(BATCH) if len(part) == BATCH]


def run(seed, **settings):
    set_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    return initialize(model, digits(seed), zoo.vector_loss, NIOConfig(report_batches=8, seed=seed, **settings))


def published(seed, **settings):
    return run(seed, **{**PER_TENSOR, "iterations": 50, "lr": 0.02, **settings})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_of_held_out_digits_agree_more_under_the_bound_of_the_paper(seed):
    before = published(seed, iterations=1).before
    result = published(seed, gamma=1.5 * before.grad_norm)
    assert {record.outcome for record in result.history} == {"accepted", "lower_norm"}
    assert result.gain > 2 * result.gain_standard_error > 0
    assert result.after.grad_norm < 1.1 * result.config.gamma
    assert result.after.loss < 1.05 * result.before.loss
    assert result.status == "improved"


def test_without_a_bound_the_gradient_norm_of_digits_runs_away():
    result = published(0, gamma=None, iterations=80, lr=0.025)
    assert {record.outcome for record in result.history} == {"accepted"}
    assert result.after.grad_norm > 2.5 * result.before.grad_norm
    assert result.status == "collapse_suspected"


@pytest.mark.parametrize(("loss_bound", "outcomes"), [(0.5, ["accepted"]), (0.02, ["loss_bound", "accepted"])])
def test_one_factor_for_the_digits_keeps_variances_and_the_bound(loss_bound, outcomes):
    result = run(0, loss_bound=loss_bound)
    (omega,) = set(result.scales.values())
    # What torch draws for its layers has a variance of 1 / (3 fan_in).
    assert omega == pytest.approx(math.sqrt(3) ** (1 / len(outcomes)), rel=0.03)
    assert f"All scaled weights were multiplied by {omega:.3g}" in result.message
    assert [record.outcome for record in result.history] == outcomes
    assert result.after.loss <= (1 + loss_bound) * result.before.loss
    assert result.status == "changed"
