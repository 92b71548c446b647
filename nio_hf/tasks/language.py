"""From a recipe of text to its trainer: tokeniser, model, blocks of tokens."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nio_hf.errors import ModelError, Problem, one_line
from nio_hf.metrics import MASKED_LM
from nio_hf.recipe.loading import Recipe
from nio_hf.tasks.task import DataFacts, Task, building, extras_of
from nio_hf.text.datasets import TextData, load_text_data
from nio_hf.text.stdlib import ABOUT, NAME
from nio_hf.text.tokenizers import BYTES, load_tokenizer
from nio_hf.text_training.trainer import TextTrainer
from nio_hf.trainer.arguments import order_seed

LONGEST_BLOCK = 1024
"""Tokens of a block where neither the recipe nor the model asks for fewer."""
_MODELS: dict[bool, Any] = {False: AutoModelForCausalLM, True: AutoModelForMaskedLM}


def build_trainer(recipe: Recipe) -> TextTrainer:
    """Tokeniser, model, data and Trainer of a recipe.

    Raises:
        NIOError: for data or a model that cannot be loaded or do not go together, or an output directory that cannot
            be written.
    """
    args, is_masked = recipe.training, recipe.task == MASKED_LM
    with building(recipe):
        tokenizer = load_recipe_tokenizer(recipe)
        model = load_model(recipe, tokenizer)
        block_size = find_block_size(recipe, model.config)
        # One process at a time prepares the data, the others find them prepared.
        with args.main_process_first(desc="preparing the data"):
            data = load_data(recipe, tokenizer, block_size)
        return TextTrainer(
            model=model,
            args=args,
            data=data,
            tokenizer=tokenizer,
            mlm_probability=recipe.text.mlm_probability if is_masked else None,
            prompt=recipe.text.sample_prompt,
            extras=extras_of(recipe, model, ABOUT if recipe.data.dataset_name == NAME else None),
        )


def load_recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokeniser that a recipe names, that of a model that is loaded, or bytes.

    Raises:
        ModelError: for one that cannot be loaded, and one without a token that the task needs.
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
            fix = "Choose the tokeniser of a masked model, e.g. that of BERT, or bytes"
            raise ModelError(Problem("tokenizer", f"no {' and no '.join(missing)}", fix))
    elif tokenizer.pad_token is None:
        # Nothing is predicted where a block is padded.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model of a recipe in fp32, built anew or loaded.

    Raises:
        ModelError: for one that cannot be loaded or built, or has fewer tokens than the tokeniser.
    """
    source = recipe.model.model_name_or_path
    if source is None:
        return build_model(recipe, tokenizer)
    options = {"trust_remote_code": recipe.model.trust_remote_code, "revision": recipe.model.model_revision}
    try:
        model: PreTrainedModel = _MODELS[recipe.task == MASKED_LM].from_pretrained(
            source, dtype=torch.float32, **options
        )
    except (OSError, ValueError, SafetensorError) as error:
        fix = f"Give a folder with a checkpoint of {recipe.task}, or its name on the Hub"
        raise ModelError(
            Problem("model_name_or_path", f"{source!r} cannot be loaded: {one_line(error)}", fix)
        ) from error
    _check_vocabulary("model_name_or_path", model.config.get_text_config().vocab_size, tokenizer)
    return model


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedModel:
    """The model of a recipe, built anew in fp32, with the vocabulary and special tokens of a tokeniser.

    Args:
        recipe: Recipe with a `model_type`.
        tokenizer: Tokeniser; None for that of the recipe, which is loaded only where the recipe leaves the size of the
            vocabulary open.

    Raises:
        ModelError: for a configuration that no model can be built from, or with fewer tokens than the tokeniser.
    """
    settings = recipe.model
    if tokenizer is None and "vocab_size" not in settings.model_config:
        tokenizer = load_recipe_tokenizer(recipe)
    own = {} if tokenizer is None else _of_tokenizer(tokenizer)
    if tokenizer is not None:
        _check_vocabulary("model_config.vocab_size", settings.model_config.get("vocab_size", len(tokenizer)), tokenizer)
    try:
        config = AutoConfig.for_model(cast(str, settings.model_type), **{**own, **settings.model_config})
        model: PreTrainedModel = _MODELS[recipe.task == MASKED_LM].from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, ImportError) as error:
        fix = f"Correct it for {settings.model_type}"
        raise ModelError(Problem("model_config", f"no model can be built from it: {one_line(error)}", fix)) from error
    return model


def find_block_size(recipe: Recipe, config: PreTrainedConfig) -> int:
    """Tokens of a block: what the recipe says, or the positions of the model, 1024 at most.

    Raises:
        ModelError: for a block that is longer than the positions of the model.
    """
    positions: int | None = getattr(config, "max_position_embeddings", None)
    asked = recipe.text.block_size
    if asked is None:
        return min(positions or LONGEST_BLOCK, LONGEST_BLOCK)
    if positions is not None and asked > positions:
        found = f"{asked} tokens, and the model has {positions} positions"
        fix = "Lower it, or give the model_config more positions"
        raise ModelError(Problem("block_size", found, fix))
    return asked


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, block_size: int) -> TextData:
    """The blocks of a recipe.

    Raises:
        DataError: see [`load_text_data`].
    """
    data = dataclasses.asdict(recipe.data)
    shared = {
        *("data_dir", "data_files", "streaming", "shuffle_buffer_size", "train_split", "eval_split"),
        *("eval_fraction", "eval_from_train", "max_train_samples", "max_eval_samples"),
    }
    return load_text_data(
        cast(str, recipe.data.dataset_name),
        config_name=recipe.data.dataset_config_name,
        revision=recipe.data.dataset_revision,
        **{key: data[key] for key in shared},
        text_column=recipe.text.text_column,
        tokenizer=tokenizer,
        block_size=block_size,
        num_proc=recipe.text.num_proc,
        seed=order_seed(recipe.training),
    )


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the configuration of a model says of its tokeniser."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"vocab_size": len(tokenizer), **ids}


def _check_vocabulary(where: str, size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    if size < len(tokenizer):
        found = f"a vocabulary of {size:,}, and the tokeniser has {len(tokenizer):,} tokens"
        fix = f"Set vocab_size to {len(tokenizer)} or more, or choose another tokenizer"
        raise ModelError(Problem(where, found, fix))


def _check_model(recipe: Recipe, model: PreTrainedModel) -> None:
    """Refuse blocks that are too long for a model."""
    find_block_size(recipe, model.config)


def _describe_data(recipe: Recipe) -> DataFacts:
    return DataFacts(len(load_recipe_tokenizer(recipe)), None)


def _describe_batch(trainer: Any) -> str:
    batch = next(iter(trainer.get_train_dataloader()))
    next(iter(trainer.get_eval_dataloader()))
    parts = [_counted(blocks) for blocks in (trainer.data.train, trainer.data.evaluation)]
    blocks, length = batch["input_ids"].shape
    return f"{parts[0]} to train on, {parts[1]} to evaluate on; {blocks} blocks of {length} tokens read"


def _counted(blocks: Any) -> str:
    return f"{blocks.tokens:,} tokens" if hasattr(blocks, "tokens") else "a stream of tokens"


TASK = Task(build_trainer, build_model, _check_model, _describe_data, _describe_batch)
"""Language modelling, causal or masked as the recipe says."""
