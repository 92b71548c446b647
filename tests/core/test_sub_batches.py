"""Pass 1 over the sub-batches of a batch, and what is said where a loss or a gradient is unsound."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nio_hf import NIOConfig, grad_cosine, initialize
from nio_hf.errors import DataError, ModelError, NumericsError
from tests import zoo
from tests.core.cases import batches_of, case, contrastive, unchanged


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
        with unchanged(model), pytest.raises(DataError, match=message):
            grad_cosine(model, given, ignoring(loss, ignored), sub_batches=2)
        with unchanged(model), pytest.raises(DataError, match=message):
            initialize(model, [given] * 8, ignoring(loss, ignored), NIOConfig(sub_batches=2))


def test_some_labels_are_enough_and_a_later_batch_without_them_is_named():
    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    batches = [masks(255, range(5, 8))] * 3 + [masks(255, range(4))]
    with pytest.raises(DataError, match="report batch 3, sub-batch 0: every label is ignored"):
        initialize(model, batches, ignoring("mean", 255), NIOConfig(sub_batches=2))


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
        return loss + (0 * first).sum().sqrt() if float(first.detach().norm()) > limit else loss

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


def test_single_samples_of_a_loss_that_compares_samples_are_pointed_out():
    made = case("mlp")
    message = r"all sub-batches are zero.* compares samples with each other .* choose fewer sub-batches"
    with pytest.raises(NumericsError, match=message):
        grad_cosine(made.model, made.batch, contrastive)
    with pytest.raises(NumericsError, match=message):
        initialize(made.model, batches_of("mlp", 8), contrastive, NIOConfig(sub_batches=8))
    assert grad_cosine(made.model, made.batch, contrastive, sub_batches=4).grad_norm > 0


def test_an_operation_that_writes_into_a_tensor_is_refused():
    made = case("mlp")

    def loss_fn(model, batch):
        outputs = model(batch[0])
        return torch.sub(outputs, 1, out=torch.empty_like(outputs)).square().mean()

    with pytest.raises(ModelError, match=r"sub-batch 0: an operation with out=\.\.\. has no derivative"):
        grad_cosine(made.model, made.batch, loss_fn, sub_batches=2)


def test_checkpointing_that_gives_no_gradient_of_chosen_tensors():
    made = case("mlp")

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(checkpoint(model[1:], model[0](batch[0]), use_reentrant=True), batch[1])

    with pytest.raises(ModelError, match=r"Checkpoint with use_reentrant=False"):
        grad_cosine(made.model, made.batch, loss_fn, sub_batches=2)
