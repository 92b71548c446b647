"""Metrics against scikit-learn, without a network."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import accuracy_score
from transformers import EvalPrediction

from nio_hf.vision.metrics import Accuracy, classification_metrics, predicted_classes


def test_accuracy_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    predictions, references = generator.integers(0, 3, (2, 50))
    computed = Accuracy(keep_in_memory=True).compute(predictions=predictions, references=references)
    assert computed == {"accuracy": accuracy_score(references, predictions)}
    assert classification_metrics(EvalPrediction(predictions, references)) == computed


def test_the_largest_logit_wins_whatever_else_a_model_returns() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert predicted_classes(logits, torch.zeros(2)).tolist() == [1, 0]
    assert predicted_classes((logits, torch.zeros(1)), torch.zeros(2)).tolist() == [1, 0]
