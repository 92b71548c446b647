"""The text trainings of the study: the bytes of Python's standard library."""

from __future__ import annotations

import base64
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nio_hf.recipe.settings import DataSettings
from nio_hf.tasks.text_trainer import MaskedCollator, counted_tokens
from nio_hf.text.datasets import load_text_data
from nio_hf.text.packing import PackedBlocks
from nio_hf.text.stdlib import NAME
from nio_hf.text.tokenizers import BYTES, load_tokenizer

LAYERS, WIDTH, HEADS, BLOCK = 4, 128, 4, 128
TOKENS = len(load_tokenizer(BYTES))
MASKED = 0.15
"""Share of the tokens that is masked (arXiv 1810.04805)."""
EVAL_FRACTION = 0.02
TEST_BLOCKS, CHOOSING_BLOCKS = 1024, 512
EVALUATION_BATCH = 64
_GPT2 = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "n_positions": BLOCK}
_BERT = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 512}
_LLAMA = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 344}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=TOKENS, bos_token_id=1, eos_token_id=1, **_GPT2, **_NO_DROPOUT)
    ),
    "bert": lambda: BertForMaskedLM(
        BertConfig(
            vocab_size=TOKENS,
            max_position_embeddings=BLOCK,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **_BERT,
        )
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=TOKENS,
            num_key_value_heads=HEADS // 2,
            max_position_embeddings=BLOCK,
            bos_token_id=1,
            eos_token_id=1,
            **_LLAMA,
        )
    ),
}
"""{name: makes a model of 4 layers and width 128}."""


@dataclasses.dataclass(frozen=True)
class TextTask:
    """A training on text, as in [`lab.Task`].

    Attributes:
        model: "gpt2", "bert" or "llama".
        steps: Budget, initialisation included.
        batch_size: Blocks of a step.
    """

    model: str
    steps: int = 500
    batch_size: int = 8

    weight_decay: ClassVar[float] = 0.1
    betas: ClassVar[tuple[float, float]] = (0.9, 0.95)
    most_norm: ClassVar[float | None] = 1.0
    failure: ClassVar[dict[str, Any]] = {"loss": round(math.log(TOKENS), 4)}
    groups: ClassVar[Mapping[str, str]] = {}

    def build(self, seed: int) -> nn.Module:
        """The model as its class draws it."""
        torch.manual_seed(seed)
        return MODELS[self.model]()

    def samples(self, data: Path, *, choosing: bool) -> TextSamples:
        """Its blocks; those that choose are the last ones of the training part."""
        train, test = load_blocks()
        if choosing:
            train, test = train[:-CHOOSING_BLOCKS], train[-CHOOSING_BLOCKS:]
        return TextSamples(train, test, self)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(summed cross-entropy, predicted tokens)."""
        tokens = counted_tokens(batch["labels"], shifted=not self.is_masked)
        return model(**batch).loss * tokens, tokens

    @property
    def is_masked(self) -> bool:
        """Whether masked tokens are predicted, in the place of the next ones."""
        return self.model == "bert"


@dataclasses.dataclass(frozen=True)
class TextSamples:
    """Blocks to train on, (N, `BLOCK`), and to evaluate on."""

    train: Tensor
    test: Tensor
    task: TextTask

    def batches(self, seed: int, *, plain: bool = False) -> Iterator[Mapping[str, Tensor]]:
        """Endless batches in an order that the seed fixes, masks included."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train), generator=generator)
            for places in order.split(self.task.batch_size):
                if len(places) == self.task.batch_size:
                    yield self._batch(self.train[places], int(torch.randint(2**62, (), generator=generator)))

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """The loss by token, and the mean loss of each block of a causal model."""
        model.eval()
        total, tokens, blocks = 0.0, 0, []
        for part in self.test.split(EVALUATION_BATCH):
            batch = self._batch(part, 0)
            logits = model(**batch).logits
            labels = batch["labels"]
            if not self.task.is_masked:
                logits, labels = logits[:, :-1], labels[:, 1:]
            by_token = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            counts = (labels != -100).sum(1)
            total, tokens = total + float(by_token.sum()), tokens + int(counts.sum())
            blocks.append(by_token.sum(1) / counts)
        model.train()
        return {"loss": total / tokens, "right": packed_losses(torch.cat(blocks))}

    def _batch(self, blocks: Tensor, seed: int) -> Mapping[str, Tensor]:
        if not self.task.is_masked:
            return {"input_ids": blocks, "labels": blocks}
        rows = [{"input_ids": row, "mask_seed": seed + number} for number, row in enumerate(blocks.tolist())]
        batch = _collator()(rows)
        return {"input_ids": batch["input_ids"], "labels": batch["labels"]}


@functools.cache
def _collator() -> MaskedCollator:
    return MaskedCollator(load_tokenizer(BYTES), MASKED)


@functools.cache
def load_blocks() -> tuple[Tensor, Tensor]:
    """(blocks to train on, blocks to test with), each (N, `BLOCK`)."""
    data = load_text_data(DataSettings(NAME, eval_fraction=EVAL_FRACTION), load_tokenizer(BYTES), BLOCK)
    parts: Any = (data.train, data.evaluation)
    train, test = (_whole_blocks(part) for part in parts)
    return train, test[:TEST_BLOCKS]


def _whole_blocks(packed: PackedBlocks) -> Tensor:
    return torch.tensor([packed[place]["input_ids"] for place in range(packed.tokens // BLOCK)])


def packed_losses(losses: Tensor) -> str:
    """Losses in half precision, as text."""
    return base64.b64encode(losses.numpy().astype(np.float16).tobytes()).decode()


def unpacked_losses(text: str) -> np.ndarray[Any, np.dtype[np.float16]]:
    """Inverse of `packed_losses`."""
    return np.frombuffer(base64.b64decode(text), np.float16)
