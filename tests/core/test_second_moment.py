"""The expected squared gradient of a training batch."""

import math
import re

import pytest
import torch
from torch import nn

from nio_hf import NIOConfig, initialize
from nio_hf.core import squared_gradients
from nio_hf.core.gradcosine import sub_batch_windows
from nio_hf.errors import ConfigError, DataError, NumericsError
from tests.core.cases import batches_of, case, double_case, unchanged


def mse(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batches_from(count, samples=32):
    """Batches with a signal in the labels, and noise."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, samples, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, samples, 2, generator=generator, dtype=torch.float64)
    return list(zip(inputs, 0.3 * inputs[..., :2] + 0.3 + noise, strict=True))


def gradients(model, batches, sub_batches):
    """(N, P) gradient of each sub-batch of all batches."""
    rows = []
    for inputs, labels in batches:
        for window in sub_batch_windows(len(inputs), sub_batches):
            grads = torch.autograd.grad(mse(model, (inputs[window], labels[window])), list(model.parameters()))
            rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


def flat(found):
    return torch.cat([tensor.flatten() for tensor in found.values()])


@pytest.mark.parametrize("training_batch_size", [8, 32, 256, 4096])
def test_it_is_the_average_over_many_random_training_batches(training_batch_size):
    model, batches = small_model(), batches_from(40)
    rows = gradients(model, batches, sub_batches=32)
    generator = torch.Generator().manual_seed(2)
    squares = torch.zeros(rows.shape[1], dtype=torch.float64)
    trials = 400
    for _ in range(trials):
        chosen = torch.randint(0, len(rows), (training_batch_size,), generator=generator)
        squares += rows[chosen].mean(0).square() / trials
    found = flat(squared_gradients(model, batches, mse, training_batch_size=training_batch_size))
    assert float(found.sum()) == pytest.approx(float(squares.sum()), rel=0.1)
    # The noise falls with the size of the training batch, where the batches that are looked at stay as they are.
    assert float((found.log() - squares.log()).abs().median()) < 0.25


@pytest.mark.parametrize("sub_batches", [2, 3, 8])
@pytest.mark.parametrize("training_batch_size", [None, 100])
def test_it_is_the_equation_of_its_docstring(sub_batches, training_batch_size):
    model, batches = small_model(), batches_from(3, 9)
    rows = gradients(model, batches, sub_batches)
    mean, variance = rows.mean(0), rows.var(0)
    ratio = 9 / sub_batches / (training_batch_size or 9)
    expected = (mean.square() - variance / len(rows)).clamp_min(0) + variance * ratio
    config = NIOConfig(sub_batches=sub_batches)
    found = squared_gradients(model, batches, mse, config, training_batch_size=training_batch_size)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: tensor.shape for name, tensor in found.items()} == shapes
    torch.testing.assert_close(flat(found), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("share", [0.3, 3.0])
def test_a_clipped_gradient_is_shorter(share):
    model, batches = small_model(), batches_from(3)
    plain = flat(squared_gradients(model, batches, mse))
    norm = math.sqrt(float(plain.sum()))
    clipped = flat(squared_gradients(model, batches, mse, max_norm=share * norm))
    torch.testing.assert_close(clipped, plain * min(1.0, share) ** 2, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["vit", "resnet", "gpt2"])
def test_models_are_left_as_they_are_and_micro_batches_change_nothing(name):
    made = double_case(name)
    batches = batches_of(name, 2)
    with unchanged(made.model):
        whole = squared_gradients(made.model, batches, made.loss_fn, NIOConfig(sub_batches=2))
    if name != "resnet":
        parts = squared_gradients(made.model, batches, made.loss_fn, NIOConfig(sub_batches=2, micro_batch_size=3))
        torch.testing.assert_close(flat(parts), flat(whole), rtol=1e-8, atol=1e-12)


def test_tensors_that_no_gradient_reaches_are_zero_and_frozen_ones_are_left_out():
    made = case("mlp")
    made.model.extra = nn.Linear(2, 3)
    made.model[0].bias.requires_grad_(False)
    found = squared_gradients(made.model, [made.batch], lambda model, batch: made.loss_fn(model[:-1], batch))
    assert not found["extra.weight"].any()
    assert found["0.weight"].any()
    assert "0.bias" not in found


def test_refusals():
    model, batches = small_model(), batches_from(1, 8)
    with pytest.raises(DataError, match="batches: none"):
        squared_gradients(model, [], mse)
    with pytest.raises(ConfigError, match="sub_batches: 9 for a batch of 8 samples"):
        squared_gradients(model, batches, mse, NIOConfig(sub_batches=9))
    with pytest.raises(NumericsError, match=r"0\.weight: the squared gradient is not finite"):
        squared_gradients(model, batches, lambda m, b: mse(m, b) * float("inf"))


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_head_of_zeros_is_refused_by_name(name):
    """No gradient passes it: there is nothing for NIO to see, nor to seed from, but the head itself."""
    made = case(name)
    head = next(key for key, _ in made.model.named_parameters() if key.endswith("classifier.weight"))
    nn.init.zeros_(made.model.get_parameter(head))
    message = f"{re.escape(head)}: all zero.*Draw its values anew"
    for call in (squared_gradients, initialize):
        with unchanged(made.model), pytest.raises(NumericsError, match=message):
            call(made.model, batches_of(name, 6, 8), made.loss_fn)
