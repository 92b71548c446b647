"""Losses of parts of a batch and their gradients."""

import pytest
import torch
from torch import nn

from nio_hf import NIOConfig, initialize
from nio_hf.core import memory
from nio_hf.core.loss import Loss, check_micro_batches, dense_gradient, gradient, graph_gradient
from nio_hf.core.mode import measuring
from nio_hf.errors import ConfigError, ModelError, NIOMemoryError
from tests import zoo
from tests.core.cases import batches_of, case, differences, double_case, state

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


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gradient_with_its_graph_can_be_differentiated_again(name):
    loss, batch = loss_of(name)
    wrt = list(loss.model.parameters())
    with measuring(loss.model):
        with_graph, mean = graph_gradient(loss, batch, wrt, seed=0)
        plain, again = dense_gradient(loss, batch, wrt, seed=0)
        for one, other in zip(with_graph, plain, strict=True):
            torch.testing.assert_close(one.detach(), other)
        assert float(mean) == pytest.approx(float(again), rel=1e-12)
        assert torch.autograd.grad(sum(g.square().sum() for g in with_graph), wrt[:1], allow_unused=True)[0].any()


def noisy(model, batch):
    """A loss that draws random numbers."""
    return zoo.vector_loss(model, (batch[0] + torch.randn_like(batch[0]), batch[1]))


def contrastive(model, batch):
    """A loss that compares the samples of a batch with each other."""
    outputs = nn.functional.normalize(model(batch[0].to(next(model.parameters()).dtype)), dim=-1)
    return nn.functional.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


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


def test_a_loss_may_take_keys_out_of_its_batch():
    loss, batch = loss_of("vit", lambda model, batch: zoo.image_loss(model, {**batch, "labels": batch.pop("labels")}))
    keys = set(batch)
    assert torch.equal(loss(batch, 0)[0], loss(batch, 0)[0])
    assert set(batch) == keys


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(4, 5), r"returned a tensor of shape \(4, 5\) as the loss\. Return a scalar"),
        (1.5, "returned a float as the loss"),
        ((torch.tensor(1.0), 1, 2), "returned a tuple as the loss"),
        ((3.0, 1), "returned a float as the loss"),
    ],
)
def test_losses_that_are_no_scalar_are_refused(returned, message):
    loss, batch = loss_of(function=lambda model, batch: returned)
    with pytest.raises(ModelError, match=message):
        loss(batch, 0)


@pytest.mark.parametrize("value", [torch.tensor(3.0), torch.ones(1, 1)])
def test_a_scalar_may_have_dimensions_and_is_the_mean_over_the_samples(value):
    loss, batch = loss_of(function=lambda model, batch: value)
    total, weight = loss(batch, 0)
    assert (float(total), weight, total.shape) == (8 * float(value), 8.0, ())
    for take_gradient in (gradient, graph_gradient):
        with pytest.raises(ModelError, match="the loss does not depend on the parameters of the model"):
            take_gradient(loss, batch, list(loss.model.parameters()), seed=0)


# Losses that cannot be computed in parts: a setting asks for it, or memory does.

UNSPLITTABLE = [
    ("mlp", noisy, r"noisy\): the mean loss .*, and it draws random numbers.* Set NIOConfig.micro_batch_size to None"),
    ("mlp", contrastive, r"contrastive\): .* compares the samples .* set NIOConfig\.micro_batch_size to None"),
    ("gpt2", mean_over_tokens, r"mean_over_tokens\): the mean loss .* Return \(loss_sum, weight\)"),
]


@pytest.mark.parametrize(("name", "function", "message"), UNSPLITTABLE)
def test_losses_that_do_not_add_up_are_refused_with_the_reason(name, function, message):
    made = case(name, 8)
    before = state(made.model)
    config = NIOConfig(sub_batches=2, micro_batch_size=2)
    with pytest.raises(ConfigError, match=message):
        initialize(made.model, batches_of(name, 8), function, config)
    assert not differences(before, state(made.model))


@pytest.mark.parametrize(("name", "function", "message"), UNSPLITTABLE)
def test_they_are_not_split_where_memory_runs_out(name, function, message, monkeypatch):
    monkeypatch.setattr(memory, "release_memory", lambda device: None)
    made = case(name, 8)
    before = state(made.model)

    def failing(model, batch):
        samples = len(batch["labels"] if isinstance(batch, dict) else batch[1])
        if samples > 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return function(model, batch)

    with pytest.raises(NIOMemoryError, match="they cannot be split: the mean loss of two micro-batches"):
        initialize(made.model, batches_of(name, 8), failing, NIOConfig(sub_batches=2))
    assert not differences(before, state(made.model))


@pytest.mark.parametrize("function", [noisy, contrastive])
def test_they_are_computed_whole_without_a_word(function):
    made = case("mlp")
    assert initialize(made.model, batches_of("mlp", 8), function, NIOConfig(sub_batches=2)).before.grad_norm > 0


@pytest.mark.parametrize("size", [1, 3, 4, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_losses_that_add_up_pass_the_check(name, size):
    loss, batch = loss_of(name)
    check_micro_batches(loss, batch, size, seed=0)


def test_a_loss_that_is_not_finite_is_left_to_the_first_pass():
    loss, batch = loss_of(function=lambda model, batch: zoo.vector_loss(model, batch) * float("nan"))
    check_micro_batches(loss, batch, 2, seed=0)
