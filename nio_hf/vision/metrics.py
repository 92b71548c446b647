"""Metrics of image classification that need no network."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from transformers import EvalPrediction

_DESCRIPTION = "Share of the samples whose predicted class is the label, in [0, 1]."


class Accuracy(evaluate.Metric):  # type: ignore[misc]
    """Top-1 accuracy of class indices, as `evaluate.load("accuracy")` gives it, without the Hub."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(predictions=datasets.Value("int64"), references=datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description="Class indices.", features=features
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def predicted_classes(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """The class of the largest logit, for `Trainer(preprocess_logits_for_metrics=...)`."""
    scores: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits
    return scores.argmax(dim=-1)


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The metrics of predicted classes, for `Trainer(compute_metrics=...)`."""
    metric = Accuracy(keep_in_memory=True)
    computed = metric.compute(predictions=prediction.predictions, references=prediction.label_ids)
    return {} if computed is None else computed
