"""From a recipe of text to its Trainer: tokeniser, model, blocks of tokens."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nio_hf.errors import ModelError, Problem
from nio_hf.metrics import MASKED_LM
from nio_hf.recipe.loading import Recipe
from nio_hf.tasks.task import DataFacts, Task, name_broken_checkpoint, name_broken_config, prepare_building
from nio_hf.tasks.text_trainer import TextTrainer
from nio_hf.text.datasets import load_text_data
from nio_hf.text.packing import TOKENS, PackedStream
from nio_hf.text.stdlib import ABOUT, NAME
from nio_hf.text.tokenizers import BYTES, load_tokenizer
from nio_hf.trainer.arguments import order_seed

_LONGEST_BLOCK = 1024
"""Number of tokens of a block, unless the recipe gives one or the model has fewer positions."""


def _auto_class(recipe: Recipe) -> Any:
    return AutoModelForMaskedLM if recipe.task == MASKED_LM else AutoModelForCausalLM


def build_trainer(recipe: Recipe) -> TextTrainer:
    """Build the Trainer of a recipe with tokeniser, model and data. Errors are as in [`nio_hf.tasks.build_trainer`]."""
    with prepare_building(recipe):
        tokenizer = load_recipe_tokenizer(recipe)
        model = _load_model(recipe, tokenizer)
        block_size = find_block_size(recipe, model)
        # One process prepares the data, and the others find them in the cache.
        with recipe.training.main_process_first(desc="preparing the data"):
            data = load_text_data(
                recipe.data,
                tokenizer,
                block_size,
                text_column=recipe.text.text_column,
                num_proc=recipe.text.num_proc,
                seed=order_seed(recipe.training),
            )
        about_data = ABOUT if recipe.data.dataset_name == NAME else None
        return TextTrainer(recipe=recipe, model=model, data=data, about_data=about_data)


def load_recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the tokeniser of a recipe: the named one, the tokeniser of a loaded model, or bytes.

    Raises:
        ModelError: Tokeniser that cannot be loaded, or lacks a token that the task needs.
    """
    model = recipe.model
    tokenizer = load_tokenizer(
        recipe.text.tokenizer or model.model_name_or_path or BYTES,
        revision=model.model_revision if recipe.text.tokenizer is None else None,
        trust_remote_code=model.trust_remote_code,
    )
    if recipe.task == MASKED_LM:
        missing = [name for name in ("mask_token", "pad_token") if getattr(tokenizer, name) is None]
        if missing:
            fix = "Choose the tokeniser of a masked model, e.g. of BERT, or bytes"
            raise ModelError(Problem("tokenizer", f"no {' and no '.join(missing)}", fix))
    elif tokenizer.pad_token is None:
        # Any token will do: nothing is predicted where a block is padded.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Build or load the model of a recipe in fp32."""
    source = recipe.model.model_name_or_path
    if source is None:
        return build_model(recipe, tokenizer)
    with name_broken_checkpoint(recipe.model, f"a checkpoint of {recipe.task}") as options:
        model: PreTrainedModel = _auto_class(recipe).from_pretrained(source, dtype=torch.float32, **options)
    _check_vocabulary("model_name_or_path", model.config.get_text_config().vocab_size, tokenizer)
    return model


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedModel:
    """Build the model of a recipe in fp32, with the vocabulary and special tokens of a tokeniser.

    Args:
        recipe: Recipe with a `model_type`.
        tokenizer: Tokeniser; None for the one of the recipe, which is loaded only where the recipe leaves the size of
            the vocabulary open.

    Raises:
        ModelError: Configuration that no model can be built from, or with fewer tokens than the tokeniser.
    """
    settings = recipe.model
    if tokenizer is None and "vocab_size" not in settings.model_config:
        tokenizer = load_recipe_tokenizer(recipe)
    own: dict[str, Any] = {}
    if tokenizer is not None:
        own = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        own["vocab_size"] = len(tokenizer)
        _check_vocabulary("model_config.vocab_size", settings.model_config.get("vocab_size", len(tokenizer)), tokenizer)
    with name_broken_config(settings):
        config = AutoConfig.for_model(cast(str, settings.model_type), **{**own, **settings.model_config})
        model: PreTrainedModel = _auto_class(recipe).from_config(config, dtype=torch.float32)
    return model


def find_block_size(recipe: Recipe, model: PreTrainedModel) -> int:
    """Number of tokens of a block: the setting of the recipe, or the positions of the model, 1024 at most.

    Raises:
        ModelError: Block that is longer than the positions of the model.
    """
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((getattr(table, "padding_idx", None) for table in tables), None)
    if positions is not None and padding is not None:
        # The positions of RoBERTa and its kin begin behind that of the padding.
        positions -= padding + 1
    asked = recipe.text.block_size
    if asked is None:
        return min(positions or _LONGEST_BLOCK, _LONGEST_BLOCK)
    if positions is not None and asked > positions:
        found = f"{asked} tokens, and the model has {positions} positions"
        raise ModelError(Problem("block_size", found, "Lower it, or give the model_config more positions"))
    return asked


def _check_vocabulary(where: str, size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    if size < len(tokenizer):
        found = f"a vocabulary of {size:,}, and the tokeniser has {len(tokenizer):,} tokens"
        fix = f"Set vocab_size to {len(tokenizer)} or more, or choose another tokenizer"
        raise ModelError(Problem(where, found, fix))


def _describe_data(recipe: Recipe) -> DataFacts:
    return DataFacts(len(load_recipe_tokenizer(recipe)), None)


def _describe_batch(trainer: TextTrainer) -> str:
    batch = next(iter(trainer.get_train_dataloader()))
    next(iter(trainer.get_eval_dataloader()))
    train, evaluation = (
        "a stream of tokens" if isinstance(blocks, PackedStream) else f"{blocks.tokens:,} tokens"
        for blocks in (trainer.data.train, trainer.data.evaluation)
    )
    blocks, length = batch[TOKENS].shape
    return f"{train} to train on, {evaluation} to evaluate on; {blocks} blocks of {length} tokens read"


TASK = Task(build_trainer, build_model, find_block_size, _describe_data, _describe_batch)
"""Language modelling, causal or masked as the recipe says."""
