"""Metrics against scikit-learn, without a network."""

from __future__ import annotations

import socket
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from transformers import EvalPrediction

from nio_hf.vision.metrics import Accuracy, TopKAccuracy, classification_metrics, predictions_and_losses
from nio_hf.vision.samples import IGNORED_LABEL


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **settings: Any) -> None:
        raise AssertionError("a metric wants to connect")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def drawn(samples: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """(logits, labels)"""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, generator=generator)
    return logits, torch.randint(classes, (samples,), generator=generator).numpy()


def metrics_of(logits: torch.Tensor, labels: np.ndarray) -> dict[str, float]:
    made = predictions_and_losses(logits, torch.from_numpy(labels))
    return classification_metrics(EvalPrediction(tuple(part.numpy() for part in made), labels))


def top_classes(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    return predictions_and_losses(logits, labels.long())[0]


def test_the_loss_is_the_mean_over_the_samples_that_count() -> None:
    logits, labels = drawn(50, 8)
    labels[::3] = IGNORED_LABEL
    expected = torch.nn.functional.cross_entropy(logits.double(), torch.from_numpy(labels), ignore_index=IGNORED_LABEL)
    assert metrics_of(logits, labels)["loss"] == pytest.approx(float(expected), rel=1e-6)


def test_they_are_metrics_of_evaluate() -> None:
    for metric in (Accuracy, TopKAccuracy):
        assert issubclass(metric, evaluate.Metric)
        assert "in [0, 1]" in metric(keep_in_memory=True).description


def test_accuracy_is_that_of_scikit_learn() -> None:
    predictions, references = np.random.default_rng(0).integers(0, 3, (2, 50))
    computed = Accuracy(keep_in_memory=True).compute(predictions=predictions, references=references)
    assert computed == {"accuracy": accuracy_score(references, predictions)}


def test_accuracy_is_added_up_over_batches() -> None:
    predictions, references = np.random.default_rng(1).integers(0, 3, (2, 50))
    metric = Accuracy(keep_in_memory=True)
    for part in (slice(0, 20), slice(20, 50)):
        metric.add_batch(predictions=predictions[part], references=references[part])
    assert metric.compute() == {"accuracy": accuracy_score(references, predictions)}


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_accuracy_is_that_of_scikit_learn(k: int) -> None:
    logits, labels = drawn(200, 8)
    classes = logits.topk(k).indices.numpy()
    computed = TopKAccuracy(keep_in_memory=True).compute(predictions=classes, references=labels)
    assert computed == {f"top{k}_accuracy": top_k_accuracy_score(labels, logits.numpy(), k=k, labels=range(8))}


@pytest.mark.parametrize("classes", [6, 10, 1000])
def test_both_accuracies_are_given_where_there_are_more_than_five_classes(classes: int) -> None:
    logits, labels = drawn(300, classes)
    scores = {
        "accuracy": accuracy_score(labels, logits.argmax(1)),
        "top5_accuracy": top_k_accuracy_score(labels, logits.numpy(), k=5, labels=range(classes)),
    }
    found = metrics_of(logits, labels)
    assert {name: found[name] for name in found if name != "loss"} == scores


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_top_five_of_no_more_than_five_classes_are_not_given(classes: int) -> None:
    logits, labels = drawn(100, classes)
    assert metrics_of(logits, labels)["accuracy"] == accuracy_score(labels, logits.argmax(1))
    assert set(metrics_of(logits, labels)) == {"loss", "accuracy"}


def test_the_largest_logits_come_first_whatever_else_a_model_returns() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert top_classes(logits, torch.zeros(2)).tolist() == [[1], [0]]
    assert top_classes((logits, torch.zeros(1)), torch.zeros(2)).tolist() == [[1], [0]]
    many = torch.tensor([[0.0, 5.0, 1.0, 4.0, 2.0, 3.0, -1.0]])
    assert top_classes(many, torch.zeros(1)).tolist() == [[1, 3, 5, 4, 2]]
    assert top_classes(many.bfloat16(), torch.zeros(1)).tolist() == [[1, 3, 5, 4, 2]]


def test_ignored_labels_do_not_count() -> None:
    logits, labels = drawn(100, 8)
    ignored = np.arange(100) % 3 == 0
    masked = np.where(ignored, IGNORED_LABEL, labels)
    assert metrics_of(logits, masked) == metrics_of(logits[~ignored], labels[~ignored])
    assert metrics_of(logits, masked) != metrics_of(logits, labels)


def test_nothing_is_said_of_labels_that_are_all_ignored() -> None:
    logits, labels = drawn(10, 8)
    assert metrics_of(logits, np.full_like(labels, IGNORED_LABEL)) == {}


def test_shares_are_python_numbers_that_can_be_written_as_json() -> None:
    found = metrics_of(*drawn(30, 8))
    assert {type(value) for value in found.values()} == {float}
