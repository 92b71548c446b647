"""The loss against its formula in fp64, and the metrics against scikit-learn, without a network."""

import socket

import evaluate
import pytest
import torch
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from transformers import EvalPrediction

from nio_hf.vision.metrics import TopKAccuracy, classification_loss, classification_metrics, predictions_and_losses
from nio_hf.vision.samples import IGNORED_LABEL

BATCH, CLASSES = 12, 5


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **settings):
        raise AssertionError("a metric wants to connect")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def drawn(samples=BATCH, classes=CLASSES):
    """(logits, labels)"""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(samples, classes, generator=generator)
    return logits, torch.randint(classes, (samples,), generator=generator)


def targets_of(kind):
    _, labels = drawn()
    if kind == "soft":
        return torch.randn(BATCH, CLASSES, generator=torch.Generator().manual_seed(2)).softmax(1)
    if kind == "some ignored":
        labels[[0, 5, 11]] = IGNORED_LABEL
    return labels


def by_the_formula(logits, targets, smoothing):
    """The mean over the samples that count of -sum_k p_k log softmax(logits)_k, in fp64."""
    if not targets.is_floating_point():
        counted = targets != IGNORED_LABEL
        logits, targets = logits[counted], torch.eye(CLASSES)[targets[counted]]
    probabilities = (1 - smoothing) * targets.double() + smoothing / CLASSES
    return -(probabilities * logits.double().log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["hard", "soft", "some ignored"])
@pytest.mark.parametrize("sizes", [(12,), (1, 4, 7)])
def test_the_loss_and_its_gradient_are_those_of_the_formula_also_in_micro_batches(sizes, kind, smoothing):
    targets = targets_of(kind)
    logits, exact = drawn()[0].requires_grad_(), drawn()[0].double().requires_grad_()
    wanted = by_the_formula(exact, targets, smoothing)
    wanted.backward()
    samples = BATCH if targets.is_floating_point() else (targets != IGNORED_LABEL).sum()
    losses = [
        classification_loss(part, own, label_smoothing=smoothing, samples=samples if len(sizes) > 1 else None)
        for part, own in zip(logits.split(sizes), targets.split(sizes), strict=True)
    ]
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(torch.stack(losses).sum().double(), wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits.grad.double(), exact.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_lower_precision_are_added_up_in_full_precision(dtype):
    logits, labels = drawn(2000)
    found = classification_loss(logits.to(dtype), labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), by_the_formula(logits.to(dtype), labels, 0.0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("samples", [None, 4])
def test_a_batch_of_which_nothing_counts_has_a_loss_and_a_gradient_of_zero(samples):
    logits = drawn()[0].requires_grad_()
    loss = classification_loss(logits, torch.full((BATCH,), IGNORED_LABEL), samples=samples)
    assert loss == 0
    loss.backward()
    assert logits.grad.abs().max() == 0


def metrics_of(logits, labels):
    made = predictions_and_losses(logits, labels)
    return classification_metrics(EvalPrediction(tuple(part.numpy() for part in made), labels.numpy()))


@pytest.mark.parametrize("classes", [2, 5, 6, 1000])
def test_loss_and_accuracies_are_those_of_the_samples_that_count(classes):
    logits, labels = drawn(300, classes)
    counted = torch.arange(300) % 3 > 0
    found = metrics_of(logits, labels.where(counted, IGNORED_LABEL))
    logits, labels = logits[counted], labels[counted]
    assert found.pop("loss") == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits.double(), labels)), rel=1e-6
    )
    scores = {"accuracy": accuracy_score(labels, logits.argmax(1))}
    if classes > 5:
        scores["top5_accuracy"] = top_k_accuracy_score(labels, logits.numpy(), k=5, labels=range(classes))
    assert found == scores
    assert {type(value) for value in found.values()} == {float}, "they can be written as JSON"
    assert metrics_of(logits, torch.full_like(labels, IGNORED_LABEL)) == {}


def test_accuracy_is_a_metric_of_evaluate_that_is_added_up_over_batches():
    metric = TopKAccuracy(keep_in_memory=True)
    assert isinstance(metric, evaluate.Metric)
    logits, labels = drawn(200, 8)
    classes = logits.topk(2).indices
    for part in (slice(0, 20), slice(20, 200)):
        metric.add_batch(predictions=classes[part].numpy(), references=labels[part].numpy())
    assert metric.compute() == {"top2_accuracy": top_k_accuracy_score(labels, logits.numpy(), k=2, labels=range(8))}


def test_the_largest_logits_come_first_whatever_else_a_model_returns():
    few, many = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([[0.0, 5.0, 1.0, 4.0, 2.0, 3.0, -1.0]])
    label = torch.zeros(1, dtype=torch.long)
    for logits, classes in ((few, [[1]]), ((few, label), [[1]]), (many, [[1, 3, 5, 4, 2]]), (many.bfloat16(), None)):
        assert predictions_and_losses(logits, label)[0].tolist() == (classes or [[1, 3, 5, 4, 2]])
