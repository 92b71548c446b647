"""Cross-entropy against classes or probabilities of classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nio_hf.vision.samples import IGNORED_LABEL


def classification_loss(
    logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0, samples: Tensor | int | None = None
) -> Tensor:
    """Mean over the samples of -sum_k p_k log softmax(logits)_k, with p = (1 - s) targets + s / K.

    Args:
        logits: (B, K).
        targets: classes (B,), where [`IGNORED_LABEL`] does not count, or probabilities (B, K).
        label_smoothing: s (arXiv 1512.00567).
        samples: what the sum is divided by, where that is more than this batch: the samples of all batches that are
            accumulated to one gradient. None for those of this batch.
    """
    total: Tensor = functional.cross_entropy(
        logits.float(), targets, ignore_index=IGNORED_LABEL, label_smoothing=label_smoothing, reduction="sum"
    )
    if samples is None:
        samples = len(targets) if targets.is_floating_point() else (targets != IGNORED_LABEL).sum()
    # A batch of which no sample counts has the loss 0.
    mean: Tensor = total / torch.as_tensor(samples, device=total.device).clamp(min=1)
    return mean
