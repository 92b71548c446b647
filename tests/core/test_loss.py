"""Losses of parts of a batch and their gradients."""

import pytest
import torch

from nio_hf import NIOConfig, initialize
from nio_hf.core import memory
from nio_hf.core.loss import Loss, dense_gradient, gradient
from nio_hf.core.mode import measuring
from nio_hf.errors import ConfigError, NIOMemoryError
from tests import zoo
from tests.core.cases import batches_of, case, contrastive, double_case, unchanged

CPU = torch.device("cpu")
FAMILIES = ["mlp", "vit", "gpt2"]


def loss_of(name="mlp", function=None):
    made = double_case(name)
    made.model.eval()
    return Loss(made.model, function or made.loss_fn, CPU), made.batch


@pytest.mark.parametrize("micro_batch_size", [None, 1, 3, 8, 99])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_micro_batches_add_up(name, micro_batch_size):
    loss, batch = loss_of(name)
    wrt = list(loss.model.parameters())
    with measuring(loss.model):
        value, weight = loss(batch, 0)
        expected = torch.autograd.grad(value / weight, wrt, allow_unused=True)
        grads, mean, total = gradient(loss, batch, wrt, seed=0, micro_batch_size=micro_batch_size)
        found, again = dense_gradient(loss, batch, wrt, seed=0, micro_batch_size=micro_batch_size)
    assert float(mean) == pytest.approx(float(value.detach() / weight), rel=1e-12)
    assert float(again) == float(mean)
    assert float(total) == float(weight)
    for one, zeros, other in zip(grads, found, expected, strict=True):
        assert (one is None) == (other is None)
        torch.testing.assert_close(zeros, torch.zeros_like(zeros) if other is None else other, rtol=1e-10, atol=1e-12)


def noisy(model, batch):
    """A loss that draws random numbers."""
    return zoo.vector_loss(model, (batch[0] + torch.randn_like(batch[0]), batch[1]))


def mean_over_tokens(model, batch):
    """A mean over a number that differs between samples."""
    loss, weight = zoo.text_loss(model, batch)
    return loss / weight


def test_random_numbers_depend_on_seed_and_part_alone():
    loss, batch = loss_of(function=noisy)
    values = {}
    for seed, part in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        torch.manual_seed(seed + 10 * part)
        values[seed, part] = loss(batch, seed, part)[0].item()
        torch.rand(3)
        assert loss(batch, seed, part)[0].item() == values[seed, part]
    assert len(set(values.values())) == 4


@pytest.mark.parametrize("value", [torch.tensor(3.0), torch.ones(1, 1)])
def test_a_scalar_may_have_dimensions_and_is_the_mean_over_the_samples(value):
    loss, batch = loss_of(function=lambda model, batch: value)
    total, weight = loss(batch, 0)
    assert (float(total), weight, total.shape) == (8 * float(value), 8.0, ())


UNSPLITTABLE = [
    ("mlp", noisy, r"noisy\): the mean loss .*, and it draws random numbers.* Set NIOConfig.micro_batch_size to None"),
    ("mlp", contrastive, r"contrastive\): .* compares the samples .* set NIOConfig\.micro_batch_size to None"),
    ("gpt2", mean_over_tokens, r"mean_over_tokens\): the mean loss .* Return \(loss_sum, weight\)"),
]


@pytest.mark.parametrize(("name", "function", "message"), UNSPLITTABLE)
def test_losses_that_do_not_add_up_are_not_split_where_a_setting_or_memory_asks_for_it(
    name, function, message, monkeypatch
):
    made = case(name, 8)
    config = NIOConfig(sub_batches=2, micro_batch_size=2)
    with unchanged(made.model), pytest.raises(ConfigError, match=message):
        initialize(made.model, batches_of(name, 8), function, config)

    def failing(model, batch):
        samples = len(batch["labels"] if isinstance(batch, dict) else batch[1])
        if samples > 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return function(model, batch)

    monkeypatch.setattr(memory, "release_memory", lambda device: None)
    message = "samples at once, and they cannot be split: the mean loss of two micro-batches"
    with unchanged(made.model), pytest.raises(NIOMemoryError, match=message):
        initialize(made.model, batches_of(name, 8), failing, NIOConfig(sub_batches=2))


@pytest.mark.parametrize("function", [noisy, contrastive])
def test_they_are_computed_whole_without_a_word(function):
    made = case("mlp")
    assert initialize(made.model, batches_of("mlp", 8), function, NIOConfig(sub_batches=2)).before.grad_norm > 0
