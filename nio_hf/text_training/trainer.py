"""`TextTrainer`: the Trainer of causal and masked language models on blocks of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nio_hf.durable.isolation import isolated_random_state
from nio_hf.text.datasets import TextData
from nio_hf.text.tokenizers import is_bytes
from nio_hf.text_training.collators import BlocksWithSeeds, CausalCollator, MaskedCollator
from nio_hf.text_training.losses import counted_tokens, losses_of_blocks, text_metrics
from nio_hf.trainer import NIOTrainingArguments
from nio_hf.training.trainer import Extras, RecipeTrainer

SAMPLE_TOKENS = 400
_TOP_K = 50


class TextTrainer(RecipeTrainer):
    """A [`RecipeTrainer`] of language models.

    Losses are means over predicted tokens, also where batches are accumulated, shared by processes, or computed in
    parts by NIO. Masks are drawn when a batch is made: all candidates of NIO are measured on the same ones.

    Args:
        model: A causal or masked language model.
        args: Arguments.
        data: Blocks of tokens.
        tokenizer: Tokeniser that is saved with the model.
        mlm_probability: Share of the tokens that is masked; None for a causal model.
        prompt: Text that `sample` goes on from; None for no sample.
        extras: What a recipe asks for beside that.

    Raises:
        ConfigError, ModelError: as in [`RecipeTrainer`].
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: NIOTrainingArguments,
        data: TextData,
        tokenizer: PreTrainedTokenizerBase,
        mlm_probability: float | None = None,
        prompt: str | None = None,
        extras: Extras = Extras(),  # noqa: B008
    ) -> None:
        self.data = data
        self._shifted = mlm_probability is None
        self._prompt = prompt if self._shifted else None
        self._counts_bits = self._shifted and is_bytes(tokenizer)
        draws_masks = mlm_probability is not None and hasattr(data.train, "__len__")
        self._samples_of_training: Any = BlocksWithSeeds(data.train) if draws_masks else data.train
        super().__init__(
            model=model,
            args=args,
            extras=extras,
            samples="blocks",
            data_collator=(
                CausalCollator(tokenizer) if mlm_probability is None else MaskedCollator(tokenizer, mlm_probability)
            ),
            train_dataset=self._samples_of_training,
            eval_dataset=data.evaluation,
            processing_class=tokenizer,
            compute_metrics=text_metrics(is_bytes=self._counts_bits),
            preprocess_logits_for_metrics=losses_of_blocks(shifted=self._shifted),
        )

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics that an evaluation has beside the loss."""
        return ("perplexity", "bits_per_byte") if self._counts_bits else ("perplexity",)

    def get_nio_dataset(self) -> Any:
        """The blocks of the training."""
        return self._samples_of_training

    def compute_nio_loss(self, model: nn.Module, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(summed cross-entropy, predicted tokens) of a batch."""
        batch: Any = self._prepare_inputs(inputs)
        tokens = counted_tokens(batch["labels"], shifted=self._shifted)
        return model(**batch).loss * tokens, tokens

    @torch.no_grad()
    def sample(self, tokens: int = SAMPLE_TOKENS) -> str | None:
        """Text that the model writes behind the prompt; None without a prompt, and where the model is sharded.

        Args:
            tokens: Largest number of tokens to write.
        """
        if self._prompt is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        model: Any = self.unwrapped_model
        tokenizer: Any = self.processing_class
        start = tokenizer(self._prompt, add_special_tokens=False, return_tensors="pt").input_ids.to(self.args.device)
        room = getattr(model.config, "max_position_embeddings", tokens) - start.shape[1]
        was_training = model.training
        model.eval()
        with isolated_random_state(self.args.device):
            torch.manual_seed(self.args.seed)
            written = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=max(1, min(tokens, room)),
                do_sample=True,
                top_k=_TOP_K,
                pad_token_id=tokenizer.pad_token_id,
            )
        model.train(was_training)
        text: str = tokenizer.decode(written[0], skip_special_tokens=True)
        return text
