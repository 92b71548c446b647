"""Losses and metrics of language models, by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import EvalPrediction

from nio_hf.text_training.losses import IGNORED, counted_tokens, losses_of_blocks, text_metrics


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator)
    labels = torch.randint(0, 7, (3, 5), generator=generator)
    labels[0, 3:] = IGNORED
    labels[2, 1] = IGNORED
    return logits, labels


@pytest.mark.parametrize("shifted", [True, False])
def test_losses_and_counts_are_those_of_the_tokens_that_are_predicted(shifted: bool) -> None:
    logits, labels = _batch()
    found = losses_of_blocks(shifted=shifted)(logits, labels)
    for block in range(3):
        pairs = [
            (logits[block, place - shifted], int(labels[block, place]))
            for place in range(shifted, 5)
            if labels[block, place] != IGNORED
        ]
        expected = sum(float(functional.cross_entropy(scores, torch.tensor(label))) for scores, label in pairs)
        assert found[block].tolist() == pytest.approx([expected, len(pairs)], rel=1e-5)
    assert counted_tokens(labels, shifted=shifted) == found[:, 1].sum()


def test_the_metrics_are_means_over_tokens_not_over_blocks() -> None:
    prediction = EvalPrediction(predictions=np.array([[10.0, 5.0], [1.0, 1.0]]), label_ids=np.zeros((2, 5)))
    found = text_metrics(is_bytes=True)(prediction)
    assert found["loss"] == pytest.approx(11 / 6)
    assert found["perplexity"] == pytest.approx(math.exp(11 / 6))
    assert found["bits_per_byte"] == pytest.approx(11 / 6 / math.log(2))
    assert "bits_per_byte" not in text_metrics(is_bytes=False)(prediction)


def test_a_loss_beyond_what_a_perplexity_can_hold_is_no_error() -> None:
    prediction = EvalPrediction(predictions=np.array([[1e6, 1.0]]), label_ids=np.zeros((1, 2)))
    assert math.isfinite(text_metrics(is_bytes=False)(prediction)["perplexity"])
    nothing = EvalPrediction(predictions=np.array([[0.0, 0.0]]), label_ids=np.zeros((1, 2)))
    assert math.isnan(text_metrics(is_bytes=False)(nothing)["loss"])
