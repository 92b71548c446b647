"""Batches, losses and metrics of causal and masked language modelling."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import EvalPrediction

from nio_hf.tasks.text_trainer import (
    IGNORED,
    BlocksWithSeeds,
    CausalCollator,
    MaskedCollator,
    counted_tokens,
    losses_of_blocks,
    text_metrics,
)
from nio_hf.text.tokenizers import load_tokenizer

TOKENIZER = load_tokenizer("bytes")
BLOCKS = [{"input_ids": list(range(10, 20))}, {"input_ids": [40, 1, 42]}]


def test_labels_are_the_tokens_and_padding_is_none_of_them():
    batch = CausalCollator(TOKENIZER)(BLOCKS)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 10)
    assert batch["labels"][0].tolist() == BLOCKS[0]["input_ids"]
    assert batch["labels"][1].tolist() == [40, 1, 42, *[-100] * 7]
    assert batch["attention_mask"][1].tolist() == [1, 1, 1, *[0] * 7]
    tokenizer = load_tokenizer("bytes")
    tokenizer.pad_token = tokenizer.eos_token
    assert CausalCollator(tokenizer)(BLOCKS)["labels"][1, :3].tolist() == [40, 1, 42], "the end of a document is one"


def test_the_mask_of_a_block_depends_on_its_seed_alone_and_leaves_random_numbers_alone():
    collate = MaskedCollator(TOKENIZER, 0.5)
    before = torch.get_rng_state()
    batches = [collate([{**BLOCKS[0], "mask_seed": seed}, BLOCKS[1]]) for seed in (3, 4)]
    alone = collate([{**BLOCKS[0], "mask_seed": 3}])
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(batches[0][key][:1], alone[key]) for key in alone)
    assert torch.equal(batches[0]["labels"][1], batches[1]["labels"][1])
    assert not torch.equal(batches[0]["labels"][0], batches[1]["labels"][0])
    assert batches[0]["attention_mask"].tolist() == [[1] * 10, [1] * 3 + [0] * 7]
    assert batches[0]["input_ids"][1, 3:].tolist() == [TOKENIZER.pad_token_id] * 7
    masked = batches[0]["labels"] != -100
    assert torch.equal(batches[0]["labels"][0][masked[0]], torch.tensor(BLOCKS[0]["input_ids"])[masked[0]])
    assert not masked[1, 3:].any()
    assert not masked[1, 1], "the end of a document is not masked"
    by_tokens = [collate(blocks)["labels"] for blocks in (BLOCKS, BLOCKS[::-1])]
    assert torch.equal(by_tokens[0], by_tokens[1].flip(0))


def test_the_share_of_masked_tokens_is_the_one_asked_for():
    blocks = [{"input_ids": [50] * 512, "mask_seed": seed} for seed in range(40)]
    masked = [float((MaskedCollator(TOKENIZER, 0.15)([block])["labels"] != -100).float().mean()) for block in blocks]
    assert sum(masked) / len(masked) == pytest.approx(0.15, abs=0.01)


def test_a_block_has_another_seed_each_time_unless_the_generator_is_the_same():
    blocks = BlocksWithSeeds(BLOCKS)
    torch.manual_seed(0)
    first, second = blocks[0], blocks[0]
    torch.manual_seed(0)
    assert blocks[0] == first != second
    assert len(blocks) == 2


@pytest.mark.parametrize("shifted", [True, False])
def test_losses_and_counts_are_those_of_the_tokens_that_are_predicted(shifted):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 5, 7, generator=generator), torch.randint(0, 7, (3, 5), generator=generator)
    labels[0, 3:] = IGNORED
    labels[2, 1] = IGNORED
    found = losses_of_blocks(logits, labels, shifted=shifted)
    for block in range(3):
        places = [place for place in range(shifted, 5) if labels[block, place] != IGNORED]
        losses = [functional.cross_entropy(logits[block, place - shifted], labels[block, place]) for place in places]
        assert found[block].tolist() == pytest.approx([float(sum(losses)), len(places)], rel=1e-5)
    assert counted_tokens(labels, shifted=shifted) == found[:, 1].sum()


def test_the_metrics_are_means_over_tokens_not_over_blocks():
    def metrics(sums, has_bits=False):
        return text_metrics(EvalPrediction(np.array(sums), np.zeros((len(sums), 5))), has_bits=has_bits)

    loss = 11 / 6
    found = metrics([[10.0, 5.0], [1.0, 1.0]], has_bits=True)
    assert found == pytest.approx({"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2)})
    assert "bits_per_byte" not in metrics([[10.0, 5.0]])
    assert math.isfinite(metrics([[1e6, 1.0]])["perplexity"])
    assert math.isnan(metrics([[0.0, 0.0]])["loss"])
