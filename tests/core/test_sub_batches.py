"""Pass 1 over the sub-batches of a batch, and what is said where a loss or a gradient is unsound."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nio_hf import NIOConfig, grad_cosine, initialize
from nio_hf.core import Collective, find_tensors
from nio_hf.core.gradcosine import sub_batch_windows
from nio_hf.core.loss import Loss
from nio_hf.core.mode import measuring
from nio_hf.core.sub_batches import first_pass, located, read, split
from nio_hf.errors import ConfigError, DataError, ModelError, NumericsError
from tests import zoo
from tests.core.cases import batches_of, case, differences, double_case, state

CPU, ALONE = torch.device("cpu"), Collective()


def parts_of(made, sub_batches=2, collective=ALONE, **settings):
    samples = len(made.batch["labels"] if isinstance(made.batch, dict) else made.batch[1])
    windows = sub_batch_windows(samples, sub_batches)
    return split(made.batch, windows, Loss(made.model, made.loss_fn, CPU), collective, where="batch", **settings)


def run(made, parts, **settings):
    loss, wrt = Loss(made.model, made.loss_fn, CPU), find_tensors(made.model).gradient_parameters
    with measuring(made.model):
        return first_pass(loss, wrt, parts, ALONE, **settings)


def test_samples_are_put_in_order_before_they_are_split():
    made = double_case("mlp", 5)
    parts = parts_of(made, order=torch.tensor([4, 2, 0, 1, 3]))
    inputs, labels = made.batch
    for index, positions in enumerate(([4, 2], [0, 1, 3])):
        assert torch.equal(parts.owned[index][0], inputs[positions])
        assert torch.equal(parts.owned[index][1], labels[positions])
    assert (parts.count, parts.batch_size) == (2, 5)


def test_a_process_takes_every_so_manieth_sub_batch():
    made = case("mlp", 10)
    owned = [parts_of(made, 5, Collective(rank, 2)).owned for rank in range(2)]
    assert [list(each) for each in owned] == [[0, 2, 4], [1, 3]]
    assert torch.equal(owned[1][3][0], made.batch[0][6:8])


def test_sub_batches_of_all_batches_draw_different_numbers():
    seeds = [parts_of(case("mlp"), 4, seed=seed).seed_of(index) for seed in range(5) for index in range(4)]
    assert len(set(seeds)) == 20


@pytest.mark.parametrize("name", ["mlp", "vit", "gpt2"])
def test_each_gradient_is_observed_and_summed(name):
    made, seen = double_case(name, 6), []
    parts = parts_of(made, 3)
    first = run(made, parts, observe=lambda gradient: seen.append([tensor.clone() for tensor in gradient]))
    tensors = find_tensors(made.model).gradient_parameters
    for index, gradient in enumerate(seen):
        with measuring(made.model):
            loss = made.mean_loss(sub_batch_windows(6, 3)[index])
            expected = torch.autograd.grad(loss, tensors, allow_unused=True)
        for one, other in zip(gradient, expected, strict=True):
            torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)
        assert float(first.sums.scalars[1, index]) == pytest.approx(loss.item(), rel=1e-9)
    assert read(first.sums, parts) == grad_cosine(made.model, made.batch, made.loss_fn, sub_batches=3)
    assert first.kept == {}


@pytest.mark.parametrize(("keep", "graphs"), [("graphs", True), ("gradients", False)])
def test_gradients_are_kept_with_their_graph_or_without(keep, graphs):
    made = case("mlp")
    first = run(made, parts_of(made), keep=keep)
    assert list(first.kept) == [0, 1]
    assert [tensor.requires_grad for tensor in first.kept[0]] == [graphs] * len(first.kept[0])
    in_parts = run(made, parts_of(made), keep=keep, micro_batch_size=2)
    assert list(in_parts.kept) == ([] if graphs else [0, 1])


# Labels that are all ignored.


def ignoring(loss, ignored):
    """A loss over pixels or samples: their mean, their sum over a number of labels that may be 0, or over samples."""

    def loss_fn(model, batch):
        inputs, labels = batch.values() if isinstance(batch, dict) else batch
        total = nn.functional.cross_entropy(model(inputs), labels, ignore_index=ignored, reduction="sum")
        count = (labels != ignored).sum()
        return {"mean": total / count, "pair": (total, count), "sum": total / len(labels)}[loss]

    return loss_fn


def masks(ignored, samples):
    """Images and masks of 4 x 4 pixels, ignored at some samples."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (8, 4, 4), generator=generator)
    labels[list(samples)] = ignored
    return {"pixel_values": torch.randn(8, 2, 4, 4, generator=generator), "labels": labels}


@pytest.mark.parametrize("ignored", [-100, 255])
@pytest.mark.parametrize("loss", ["mean", "pair", "sum"])
@pytest.mark.parametrize(("samples", "place"), [(range(4, 8), 1), (range(8), 0)])
def test_sub_batches_whose_labels_are_all_ignored_are_named(ignored, loss, samples, place):
    model, batch = nn.Sequential(nn.Conv2d(2, 3, 1)), masks(ignored, samples)
    message = rf"report batch 0, sub-batch {place}: every label is ignored, .* Give larger batches"
    for given in (batch, tuple(batch.values())):
        before = state(model)
        with pytest.raises(DataError, match=message):
            grad_cosine(model, given, ignoring(loss, ignored), sub_batches=2)
        with pytest.raises(DataError, match=message):
            initialize(model, [given] * 8, ignoring(loss, ignored), NIOConfig(sub_batches=2))
        assert not differences(before, state(model))


def test_sub_batches_with_some_labels_are_measured():
    model, batch = nn.Sequential(nn.Conv2d(2, 3, 1)), masks(255, range(5, 8))
    assert grad_cosine(model, batch, ignoring("mean", 255), sub_batches=2).grad_norm > 0


def test_a_later_batch_without_labels_is_named():
    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    batches = [masks(255, range(0))] * 3 + [masks(255, range(4))]
    with pytest.raises(DataError, match="report batch 3, sub-batch 0: every label is ignored"):
        initialize(model, batches, ignoring("mean", 255), NIOConfig(sub_batches=2))


# Losses and gradients that are unsound for other reasons.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_named_with_its_sub_batch(value):
    made = case("mlp", 9)

    def loss_fn(model, batch):
        loss = zoo.vector_loss(model, batch)
        return loss * value if torch.equal(batch[0], made.batch[0][3:6]) else loss

    with pytest.raises(NumericsError, match=r"report batch 0, sub-batch 1: the loss is (nan|-?inf)"):
        grad_cosine(made.model, made.batch, loss_fn, sub_batches=3)


def test_a_gradient_that_is_not_finite_names_its_tensor():
    made = case("mlp")

    def loss_fn(model, batch):
        return zoo.vector_loss(model, batch) + (model[4].weight * 0).sum().sqrt()

    with pytest.raises(NumericsError, match=r"sub-batch 0: the gradient of 4\.weight is not finite\. Check inputs"):
        grad_cosine(made.model, made.batch, loss_fn, sub_batches=2)


class InfiniteGradient(torch.autograd.Function):
    """Zero, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, weight):
        ctx.shape = weight.shape
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx, gradient):
        return torch.full(ctx.shape, math.inf)


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_tensor_is_named_in_the_memory_that_there_is(micro_batch_size):
    """A candidate whose gradient is not finite breaks the bound, also where only two samples fit into memory."""
    made = case("mlp")
    first = made.model[0].weight
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.mul_(0.2)
    limit = 3 * float(first.detach().norm())

    def loss_fn(model, batch):
        if len(batch[0]) > 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("out of memory")
        loss = made.loss_fn(model, batch)
        return loss + InfiniteGradient.apply(first) if float(first.detach().norm()) > limit else loss

    config = NIOConfig(sub_batches=2, report_batches=1, micro_batch_size=micro_batch_size, loss_bound=None)
    result = initialize(made.model, [made.batch], loss_fn, config)
    assert [record.outcome for record in result.history] == ["loss_bound", "accepted"]


def test_a_norm_that_overflows_is_told_from_a_gradient_that_does():
    made = case("mlp")
    with pytest.raises(NumericsError, match=r"all tensors together \(their squared norm overflows\) is not finite"):
        grad_cosine(made.model, made.batch, lambda m, b: 1e30 * zoo.vector_loss(m, b), sub_batches=2)


def test_gradients_that_are_zero():
    made = case("mlp")
    with pytest.raises(NumericsError, match="report batch 0: the gradients of all sub-batches are zero") as caught:
        grad_cosine(made.model, made.batch, lambda m, b: 0 * zoo.vector_loss(m, b), sub_batches=2)
    assert "compares samples" not in str(caught.value)

    def second_only(model, batch):
        return zoo.vector_loss(model, batch) * float(torch.equal(batch[0], made.batch[0][4:]))

    with pytest.raises(NumericsError, match="sub-batch 0: the gradient is zero, so it has no direction"):
        grad_cosine(made.model, made.batch, second_only, sub_batches=2)


def contrastive(model, batch):
    """A loss that compares the samples of a batch with each other: 0 for one alone."""
    outputs = nn.functional.normalize(model(batch[0]), dim=-1)
    return nn.functional.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


def test_single_samples_of_a_loss_that_compares_samples_are_pointed_out():
    made = case("mlp")
    message = r"all sub-batches are zero.* compares samples with each other .* choose fewer sub-batches"
    with pytest.raises(NumericsError, match=message):
        grad_cosine(made.model, made.batch, contrastive)
    with pytest.raises(NumericsError, match=message):
        initialize(made.model, batches_of("mlp", 8), contrastive, NIOConfig(sub_batches=8))
    assert grad_cosine(made.model, made.batch, contrastive, sub_batches=4).grad_norm > 0


# Batch normalisation.


@pytest.mark.parametrize(
    ("sub_batches", "micro_batch_size", "message"),
    [
        (8, None, r"sub_batches: one sample for a sub-batch under batch normalisation\. Choose fewer"),
        (5, None, "one sample for a sub-batch"),
        (2, 2, r"micro_batch_size: given for a model with batch normalisation\. Leave it out"),
    ],
)
def test_sub_batches_that_have_no_statistics(sub_batches, micro_batch_size, message):
    made = case("resnet")
    with pytest.raises(ConfigError, match=message):
        parts_of(made, sub_batches, micro_batch_size=micro_batch_size)
    with pytest.raises(ConfigError, match=message):
        grad_cosine(made.model, made.batch, made.loss_fn, sub_batches=sub_batches, micro_batch_size=micro_batch_size)


# Errors of others.


@pytest.mark.parametrize(
    ("error", "type_", "message"),
    [
        (IndexError("Target 77 is out of bounds."), DataError, r"batch 3: an index is out of range \(Target 77"),
        (IndexError("index out of range in self"), DataError, "tokens in the vocabulary"),
        (RuntimeError("derivative for aten::f is not implemented\nlong"), ModelError, "no second derivative"),
        (
            RuntimeError("f(): functions with out=... arguments don't support automatic differentiation"),
            ModelError,
            "out",
        ),
        (
            RuntimeError("Checkpointing is not compatible with .grad() ... use_reentrant"),
            ModelError,
            "use_reentrant=Fal",
        ),
    ],
)
def test_known_errors_become_ours(error, type_, message):
    with pytest.raises(type_, match=message), located("batch 3"):
        raise error


@pytest.mark.parametrize("error", [ValueError("Target is out of bounds"), RuntimeError("mine"), KeyError("labels")])
def test_other_errors_stay_as_they_are_and_say_where(error):
    with pytest.raises(type(error)) as caught, located("batch 3"):
        raise error
    assert caught.value is error
    assert caught.value.__notes__ == ["raised at batch 3"]


def test_checkpointing_that_gives_no_gradient_of_chosen_tensors():
    made = case("mlp")

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(checkpoint(model[1:], model[0](batch[0]), use_reentrant=True), batch[1])

    with pytest.raises(ModelError, match=r"Checkpoint with use_reentrant=False"):
        grad_cosine(made.model, made.batch, loss_fn, sub_batches=2)
