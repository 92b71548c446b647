"""Metrics of image classification that need no network."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch.nn import functional
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


def predictions_and_losses(logits: Any, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the metrics need of each sample, for `Trainer(preprocess_logits_for_metrics=...)`.

    Returns:
        The classes (B, k) of the k largest logits, largest first, where k is 5, or 1 where there are no more than 5
        classes; and the cross-entropy (B,), 0 for samples with [`IGNORED_LABEL`].
    """
    scores: torch.Tensor = logits[0] if isinstance(logits, tuple) else logits
    classes = scores.topk(TOP_K if scores.shape[-1] > TOP_K else 1, dim=-1).indices
    return classes, functional.cross_entropy(scores.float(), labels, ignore_index=IGNORED_LABEL, reduction="none")


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Loss, accuracy, and top-5 accuracy where there are more than 5 classes, for `Trainer(compute_metrics=...)`.

    The loss is the mean over the samples. That of Trainer is one over batches, in which samples count twice that fill
    the last batch of several processes, and samples that do not count have a share.

    Args:
        prediction: of [`predictions_and_losses`]; samples with [`IGNORED_LABEL`] do not count.
    """
    counted = np.asarray(prediction.label_ids) != IGNORED_LABEL
    labels = np.asarray(prediction.label_ids)[counted]
    classes, losses = (np.asarray(values)[counted] for values in prediction.predictions)
    if not len(labels):
        return {}
    computed = {"loss": float(losses.mean(dtype=np.float64))}
    computed |= dict(Accuracy(keep_in_memory=True).compute(predictions=classes[:, 0], references=labels) or {})
    if classes.shape[1] > 1:
        computed.update(TopKAccuracy(keep_in_memory=True).compute(predictions=classes, references=labels) or {})
    return computed
