"""From blocks of tokens to batches, with transformers' collators."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import DataCollatorForLanguageModeling, DataCollatorForTokenClassification, PreTrainedTokenizerBase

from nio_hf.durable.isolation import isolated_random_state

_SEED = "mask_seed"
_SEEDS = 2**62
Block = dict[str, Any]


class CausalCollator:
    """Batches of blocks whose labels are their tokens; a shorter block is padded, and what pads it is no label.

    transformers' collator for language modelling takes every token that is equal to the padding for padding, the ends
    of documents included where a tokeniser has one token for both.

    Args:
        tokenizer: Tokeniser with a padding token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._pad = DataCollatorForTokenClassification(tokenizer)

    def __call__(self, blocks: Sequence[Block]) -> dict[str, torch.Tensor]:
        """Tensors (B, T): `input_ids`, `attention_mask` and `labels`."""
        labelled = [{"input_ids": block["input_ids"], "labels": block["input_ids"]} for block in blocks]
        batch: dict[str, torch.Tensor] = self._pad(labelled)
        return batch


class MaskedCollator:
    """Batches of blocks in which some tokens are masked (arXiv 1810.04805, section 3.1), which are the labels.

    Masks depend on the seed of the first block, in whatever process; of blocks without one, as in evaluation, on its
    tokens, so that every evaluation has the same masks.

    Args:
        tokenizer: Tokeniser with a padding and a mask token.
        probability: Share of the tokens that is masked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float) -> None:
        self._mask = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=probability)

    def __call__(self, blocks: Sequence[Block]) -> dict[str, torch.Tensor]:
        """Tensors (B, T): `input_ids`, `attention_mask` and `labels`, -100 where nothing is masked."""
        tokens = [{"input_ids": block["input_ids"]} for block in blocks]
        seed = blocks[0].get(_SEED, zlib.crc32(np.asarray(tokens[0]["input_ids"], np.int64).tobytes()))
        with isolated_random_state(torch.device("cpu")):
            torch.manual_seed(seed)
            batch: dict[str, torch.Tensor] = self._mask(tokens)
        return batch


class BlocksWithSeeds(Dataset[Block]):
    """Blocks with a seed for their masks, drawn from torch's generator: another one each time that a block is read.

    Args:
        blocks: A map-style data set.
    """

    def __init__(self, blocks: Any) -> None:
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> Block:
        return {**self._blocks[index], _SEED: int(torch.randint(_SEEDS, ()))}
