"""Metrics of image classification that need no network."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from transformers import EvalPrediction

from nio_hf.vision.samples import IGNORED_LABEL

TOP_K = 5
_DESCRIPTION = "Share of the samples whose label is among the predicted classes, in [0, 1]."


class Accuracy(evaluate.Metric):  # type: ignore[misc]
    """Top-1 accuracy of class indices, as `evaluate.load("accuracy")` gives it, without the Hub."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(predictions=datasets.Value("int64"), references=datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description="Class indices.", features=features
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class TopKAccuracy(evaluate.Metric):  # type: ignore[misc]
    """Top-k accuracy of the k most probable classes of each sample; the metric is called after their number."""

    def _info(self) -> evaluate.MetricInfo:
        classes = datasets.Sequence(datasets.Value("int64"))
        features = datasets.Features(predictions=classes, references=datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description="k class indices a sample.", features=features
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        classes = np.asarray(predictions)
        hits = (classes == np.asarray(references)[:, None]).any(axis=1)
        return {f"top{classes.shape[1]}_accuracy": float(hits.mean())}


def top_classes(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """The classes (B, k) of the k largest logits, largest first, for `Trainer(preprocess_logits_for_metrics=...)`.

    k is 5, or 1 where there are no more than 5 classes.
    """
    scores: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits
    return scores.topk(TOP_K if scores.shape[-1] > TOP_K else 1, dim=-1).indices


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy, and top-5 accuracy where there are more than 5 classes, for `Trainer(compute_metrics=...)`.

    Args:
        prediction: of [`top_classes`]; samples with [`IGNORED_LABEL`] do not count.
    """
    counted = np.asarray(prediction.label_ids) != IGNORED_LABEL
    classes, labels = np.asarray(prediction.predictions)[counted], np.asarray(prediction.label_ids)[counted]
    if not len(labels):
        return {}
    computed = dict(Accuracy(keep_in_memory=True).compute(predictions=classes[:, 0], references=labels) or {})
    if classes.shape[1] > 1:
        computed.update(TopKAccuracy(keep_in_memory=True).compute(predictions=classes, references=labels) or {})
    return computed
