"""Loss and metrics of image classification."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import EvalPrediction

from nio_hf.vision.samples import IGNORED_LABEL

TOP_K = 5


def classification_loss(
    logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, samples: Tensor | int | None = None
) -> Tensor:
    """Mean over the samples of -sum_k p_k log softmax(logits)_k, with p = (1 - s) targets + s / K.

    Args:
        logits: Logits (B, K).
        targets: Classes (B,), where [`IGNORED_LABEL`] does not count, or probabilities (B, K).
        label_smoothing: Smoothing s (arXiv 1512.00567).
        samples: Number of samples of all batches that are accumulated to one gradient; None for this batch alone.
    """
    total: Tensor = functional.cross_entropy(
        logits.float(), targets, ignore_index=IGNORED_LABEL, label_smoothing=label_smoothing, reduction="sum"
    )
    if samples is None:
        samples = len(targets) if targets.is_floating_point() else (targets != IGNORED_LABEL).sum()
    # The loss of a batch without a sample that counts is 0.
    mean: Tensor = total / torch.as_tensor(samples, device=total.device).clamp(min=1)
    return mean


class TopKAccuracy(evaluate.Metric):  # type: ignore[misc]
    """Share of the samples whose label is among the k predicted classes, in [0, 1].

    The name is "accuracy" for k = 1, as in `evaluate.load("accuracy")`, else "top{k}_accuracy".
    """

    def _info(self) -> evaluate.MetricInfo:
        classes = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=str(type(self).__doc__),
            citation="",
            inputs_description="k class indices a sample.",
            features=datasets.Features(predictions=classes, references=datasets.Value("int64")),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        classes = np.asarray(predictions)
        hits = (classes == np.asarray(references)[:, None]).any(axis=1)
        return {"accuracy" if classes.shape[1] == 1 else f"top{classes.shape[1]}_accuracy": float(hits.mean())}


def predictions_and_losses(logits: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted classes and loss of each sample, for `Trainer(preprocess_logits_for_metrics=...)`.

    Returns:
        Classes (B, k) of the k largest logits, largest first, with k = 5, or k = 1 for 5 classes or fewer; and
        cross-entropies (B,), 0 for samples with [`IGNORED_LABEL`].
    """
    scores: Tensor = logits[0] if isinstance(logits, tuple) else logits
    classes = scores.topk(TOP_K if scores.shape[-1] > TOP_K else 1, dim=-1).indices
    return classes, functional.cross_entropy(scores.float(), labels, ignore_index=IGNORED_LABEL, reduction="none")


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Loss, accuracy, and for more than 5 classes top-5 accuracy, for `Trainer(compute_metrics=...)`.

    The loss is the mean over the samples that count. Trainer's own loss is a mean over batches, which counts ignored
    samples, and counts samples twice that fill the last batch of several processes.

    Args:
        prediction: Results of [`predictions_and_losses`]; samples with [`IGNORED_LABEL`] do not count.
    """
    counted = np.asarray(prediction.label_ids) != IGNORED_LABEL
    labels = np.asarray(prediction.label_ids)[counted]
    classes, losses = (np.asarray(values)[counted] for values in prediction.predictions)
    if not len(labels):
        return {}
    computed = {"loss": float(losses.mean(dtype=np.float64))}
    for k in sorted({1, classes.shape[1]}):
        computed |= TopKAccuracy(keep_in_memory=True).compute(predictions=classes[:, :k], references=labels) or {}
    return computed
