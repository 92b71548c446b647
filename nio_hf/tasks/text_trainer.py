"""Trainer of causal and masked language models on blocks of tokens, with its batches and losses."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nio_hf.durable.isolation import isolated_random_state
from nio_hf.metrics import MASKED_LM
from nio_hf.recipe.loading import Recipe
from nio_hf.tasks.trainer import RecipeTrainer
from nio_hf.text.datasets import TextData
from nio_hf.text.packing import TOKENS
from nio_hf.text.tokenizers import is_bytes

IGNORED = -100
"""Label of a token that is not predicted."""
_SAMPLES, _SAMPLE_TOKENS, _TEMPERATURE = 3, 400, 0.7
"""Number of texts that are drawn after a training, largest number of tokens of each, and their temperature."""
_SEED = "mask_seed"
_MAX_SEED = 2**62
Block = dict[str, Any]


class CausalCollator(DataCollatorForTokenClassification):
    """Collator of blocks whose labels are their tokens. Shorter blocks are padded, and padding is no label.

    The collator of transformers for language modelling takes every token that is equal to the padding for padding, even
    the ends of documents where a tokeniser has one token for both.
    """

    def __call__(self, blocks: Sequence[Block], return_tensors: str | None = None) -> dict[str, Tensor]:
        """Tensors (B, T): `input_ids`, `attention_mask` and `labels`."""
        batch: dict[str, Tensor] = super().__call__([{TOKENS: b[TOKENS], "labels": b[TOKENS]} for b in blocks])
        return batch


class MaskedCollator:
    """Collator of blocks that masks some tokens (arXiv 1810.04805, section 3.1), which are the labels.

    The mask of a block depends on its seed, in whatever batch and process. That of a block without a seed, as in
    evaluation, depends on its tokens, so that every evaluation has the same masks.

    Args:
        tokenizer: Tokeniser with a padding and a mask token.
        probability: Share of the tokens that are masked.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float) -> None:
        self._mask = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=probability)
        self._padding = {TOKENS: tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}

    def __call__(self, blocks: Sequence[Block]) -> dict[str, Tensor]:
        """Tensors (B, T): `input_ids`, `attention_mask` and `labels`, -100 where nothing is masked."""
        masked: list[dict[str, Tensor]] = []
        with isolated_random_state(torch.device("cpu")):
            for block in blocks:
                torch.manual_seed(block.get(_SEED, zlib.crc32(np.asarray(block[TOKENS], np.int64).tobytes())))
                masked.append(self._mask([{TOKENS: block[TOKENS]}]))
        return {
            key: nn.utils.rnn.pad_sequence([one[key][0] for one in masked], batch_first=True, padding_value=padding)
            for key, padding in self._padding.items()
        }


class BlocksWithSeeds(Dataset[Block]):
    """Map-style blocks with a seed for their masks, which torch's generator draws whenever a block is read."""

    def __init__(self, blocks: Any) -> None:
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> Block:
        return {**self._blocks[index], _SEED: int(torch.randint(_MAX_SEED, ()))}


def counted_tokens(labels: Tensor, *, shifted: bool) -> Tensor:
    """Number of predicted tokens of labels (B, T), where `IGNORED` does not count.

    With `shifted` each token is predicted from the tokens before it, and the first token of a block is not predicted.
    """
    return ((labels[:, 1:] if shifted else labels) != IGNORED).sum()


def losses_of_blocks(logits: Any, labels: Tensor, *, shifted: bool) -> Tensor:
    """Summed cross-entropy and number of predicted tokens (B, 2) of each block.

    Given as `Trainer(preprocess_logits_for_metrics=...)`, they replace the logits of all tokens.
    """
    scores: Tensor = logits[0] if isinstance(logits, tuple) else logits
    if shifted:
        scores, labels = scores[:, :-1], labels[:, 1:]
    by_token = functional.cross_entropy(scores.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return torch.stack([by_token.double().sum(1), (labels != IGNORED).double().sum(1)], dim=1)


def text_metrics(prediction: EvalPrediction, *, has_bits: bool) -> dict[str, float]:
    """Loss, perplexity and, with `has_bits`, bits per byte, for `Trainer(compute_metrics=...)`.

        loss = sum over tokens of -log p / number of tokens    perplexity = exp(loss)    bits per byte = loss / log 2

    Trainer's own loss is a mean over batches, in which the tokens of a short block weigh more.
    """
    sums = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    loss = float(sums[0] / sums[1]) if sums[1] else math.nan
    found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    return {**found, "bits_per_byte": loss / math.log(2)} if has_bits else found


class TextTrainer(RecipeTrainer):
    """A [`RecipeTrainer`] of language models.

    Losses are means over predicted tokens, also where batches are accumulated, shared by processes, or computed in
    parts by NIO. Masks are drawn when a batch is made, so that all candidates of NIO are measured with the same masks.

    Args:
        recipe: Recipe of the training.
        model: Causal or masked language model.
        data: Blocks of tokens, with the tokeniser that is saved with the model.
        about_data: Description of the data set, as in [`RecipeTrainer`].

    Raises:
        ConfigError, ModelError: Settings as in [`RecipeTrainer`].
    """

    def __init__(
        self, *, recipe: Recipe, model: PreTrainedModel, data: TextData, about_data: str | None = None
    ) -> None:
        self.data = data
        tokenizer, is_masked = data.tokenizer, recipe.task == MASKED_LM
        self._shifted = not is_masked
        self._has_bits = not is_masked and is_bytes(tokenizer)
        draws_masks = is_masked and hasattr(data.train, "__len__")
        self._samples_of_training: Any = BlocksWithSeeds(data.train) if draws_masks else data.train
        probability = recipe.text.mlm_probability
        super().__init__(
            recipe=recipe,
            model=model,
            samples="blocks",
            about_data=about_data,
            data_collator=MaskedCollator(tokenizer, probability) if is_masked else CausalCollator(tokenizer),
            train_dataset=self._samples_of_training,
            eval_dataset=data.evaluation,
            processing_class=tokenizer,
            compute_metrics=lambda prediction: text_metrics(prediction, has_bits=self._has_bits),
            preprocess_logits_for_metrics=lambda *values: losses_of_blocks(*values, shifted=self._shifted),
        )

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics beside the loss."""
        return ("perplexity", "bits_per_byte") if self._has_bits else ("perplexity",)

    def get_nio_dataset(self) -> Any:
        """Blocks of the training."""
        return self._samples_of_training

    def compute_nio_loss(self, model: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
        """Return (summed cross-entropy, number of predicted tokens) of a batch."""
        batch: Any = self._prepare_inputs(inputs)
        tokens = counted_tokens(batch["labels"], shifted=self._shifted)
        if not tokens:
            # The loss of the model is a mean, which is no number over no token.
            return model(**{key: value for key, value in batch.items() if key != "labels"}).logits.sum() * 0, tokens
        return model(**batch).loss * tokens, tokens

    @torch.no_grad()
    def sample(self) -> str | None:
        """Texts of a causal model behind the prompt of the recipe; None without a prompt, and for sharded weights."""
        prompt = self.recipe.text.sample_prompt if self._shifted else None
        if prompt is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        model: Any = self.unwrapped_model
        tokenizer: Any = self.processing_class
        # An empty prompt is the start of a document; of a long one the end is kept that leaves room for a token.
        tokens = tokenizer(prompt, add_special_tokens=False).input_ids or [tokenizer.eos_token_id]
        positions = getattr(model.config, "max_position_embeddings", len(tokens) + _SAMPLE_TOKENS)
        start = torch.tensor([tokens[1 - positions :]], device=self.args.device)
        was_training = model.training
        model.eval()
        with isolated_random_state(self.args.device):
            torch.manual_seed(self.args.seed)
            output = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=min(_SAMPLE_TOKENS, positions - start.shape[1]),
                do_sample=True,
                temperature=_TEMPERATURE,
                num_return_sequences=_SAMPLES,
                pad_token_id=tokenizer.pad_token_id,
            )
        model.train(was_training)
        texts: list[str] = tokenizer.batch_decode(output, skip_special_tokens=True)
        return "\n\n".join(text.rstrip() for text in texts)
