"""Cross-entropy of language models by token, in training and in evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import EvalPrediction

IGNORED = -100
"""Label of a token that is not predicted."""


def counted_tokens(labels: Tensor, *, shifted: bool) -> Tensor:
    """Number of the tokens that are predicted.

    Args:
        labels: (B, T) tokens, where `IGNORED` does not count.
        shifted: Whether each token is predicted from those before it, so that the first one of a block is not.
    """
    return ((labels[:, 1:] if shifted else labels) != IGNORED).sum()


def losses_of_blocks(*, shifted: bool) -> Callable[[Any, Tensor], Tensor]:
    """(logits, labels) -> (B, 2): the summed cross-entropy of each block, and its predicted tokens.

    It is for `Trainer(preprocess_logits_for_metrics=...)`, which would otherwise keep the logits of all tokens.
    """

    def losses(logits: Any, labels: Tensor) -> Tensor:
        scores: Tensor = logits[0] if isinstance(logits, tuple) else logits
        if shifted:
            scores, labels = scores[:, :-1], labels[:, 1:]
        by_token = functional.cross_entropy(
            scores.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        return torch.stack([by_token.double().sum(1), (labels != IGNORED).double().sum(1)], dim=1)

    return losses


def text_metrics(*, is_bytes: bool) -> Callable[[EvalPrediction], dict[str, float]]:
    """Loss, perplexity and, of a causal model of bytes, bits per byte, for `Trainer(compute_metrics=...)`.

        loss = sum over tokens of -log p / number of tokens    perplexity = exp(loss)    bits per byte = loss / log 2

    The loss of Trainer is a mean over batches, in which the tokens of a short block weigh more.
    """

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        sums = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
        loss = float(sums[0] / sums[1]) if sums[1] else math.nan
        found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        return {**found, "bits_per_byte": loss / math.log(2)} if is_bytes else found

    return metrics
