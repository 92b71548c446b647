"""GC, GN and the windows of the sub-batches."""

import itertools

import pytest
import torch
from torch import nn

from nio_hf import grad_cosine
from nio_hf.core.gradcosine import published_windows, sub_batch_windows
from nio_hf.errors import ConfigError
from tests.core.cases import case, unchanged


def weighted(model, batch):
    """Mean of the cross-entropy times a weight of each sample."""
    inputs, labels, weights = batch
    return (nn.functional.cross_entropy(model(inputs), labels, reduction="none") * weights).mean()


def test_identical_sub_batches_of_a_model_agree():
    made = case("vit", 2)
    twice = {name: torch.cat([value, value]) for name, value in made.batch.items()}
    measured = grad_cosine(made.model, twice, made.loss_fn, sub_batches=2)
    assert measured.value == pytest.approx(1, abs=1e-5)
    assert measured.norms[0] == pytest.approx(measured.norms[1], rel=1e-6)


def test_opposite_losses_of_a_model_disagree():
    made = case("mlp", 2)
    inputs, labels = (torch.cat([value, value]) for value in made.batch)
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0])
    measured = grad_cosine(made.model, (inputs, labels, signs), weighted, sub_batches=2)
    assert measured.value == pytest.approx(-1, abs=1e-5)


def test_rescaling_the_loss_of_a_sub_batch_changes_its_norm_only():
    made, weights = case("mlp"), torch.ones(8)
    plain = grad_cosine(made.model, (*made.batch, weights), weighted, sub_batches=4)
    weights[2:4] = 64.0
    rescaled = grad_cosine(made.model, (*made.batch, weights), weighted, sub_batches=4)
    assert rescaled.value == pytest.approx(plain.value, abs=1e-5)
    assert rescaled.norms[1] == pytest.approx(64 * plain.norms[1], rel=1e-5)
    assert rescaled.norms[0] == pytest.approx(plain.norms[0], rel=1e-6)


@pytest.mark.parametrize("name", ["mlp", "vit", "bert"])
def test_sample_wise_is_the_loop_over_samples(name):
    made = case(name, 5)
    with unchanged(made.model):
        measured = grad_cosine(made.model, made.batch, made.loss_fn)
    made.model.eval()
    tensors = [parameter for parameter in made.model.parameters() if parameter.any()]
    rows, losses = [], []
    for sample in range(5):
        loss = made.mean_loss([sample])
        rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, tensors)]))
        losses.append(loss.item())
    gradients = torch.stack(rows)
    cosines = [nn.functional.cosine_similarity(a, b, dim=0) for a, b in itertools.combinations(gradients, 2)]
    assert measured.value == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-5)
    assert measured.norms == pytest.approx(gradients.norm(dim=1).tolist(), rel=1e-4)
    assert measured.grad_norm == pytest.approx(float(gradients.norm(dim=1).mean()), rel=1e-4)
    assert measured.loss == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert (measured.batch_size, measured.sub_batches) == (5, 5)


def test_windows_partition_the_batch():
    assert sub_batch_windows(10, 4) == [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]
    for size in range(2, 20):
        for count in range(2, size + 1):
            windows = sub_batch_windows(size, count)
            assert [position for window in windows for position in window] == list(range(size))
            lengths = [len(window) for window in windows]
            assert len(windows) == count
            assert max(lengths) - min(lengths) <= 1


def test_the_published_windows_grow_with_their_number():
    assert published_windows(10, 3, 0.0) == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    ends = [(window[0], window[-1] + 1) for window in published_windows(64, 4, 0.2)]
    assert ends == [(0, 19), (12, 38), (25, 57), (38, 64)]
    assert published_windows(64, 2, 0.0) == sub_batch_windows(64, 2)


@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5, 0.99])
def test_published_windows_are_never_empty_and_stay_in_the_batch(overlap):
    for size in range(2, 16):
        for count in range(2, size + 1):
            windows = published_windows(size, count, overlap)
            assert len(windows) == count
            assert all(window and window == list(range(window[0], window[-1] + 1)) for window in windows)
            assert {position for window in windows for position in window} == set(range(size))


@pytest.mark.parametrize("sub_batches", [1, 9])
def test_windows_that_cannot_be_are_refused(sub_batches):
    with pytest.raises(ConfigError, match=rf"NIOConfig\.sub_batches: {sub_batches} for a batch of 8 samples"):
        sub_batch_windows(8, sub_batches)
    with pytest.raises(ConfigError, match=r"NIOConfig\.sub_batches: .*Choose 2 to 8 sub-batches"):
        published_windows(8, sub_batches, 0.2)
