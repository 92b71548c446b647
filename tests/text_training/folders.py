"""Small recipes of text for tests."""

from __future__ import annotations

import json
import random
from pathlib import Path

from nio_hf.recipe.loading import Recipe, load_recipe

WORDS = (
    "def",
    "return",
    "if",
    "else",
    "for",
    "in",
    "while",
    "class",
    "self",
    "None",
    "x",
    "y",
    "=",
    "+",
    "(",
    ")",
    ":",
)
GPT2 = "task: causal-lm\nmodel_type: gpt2\nmodel_config: {n_layer: 2, n_embd: 16, n_head: 2, n_positions: 32}\n"
BERT = (
    "task: masked-lm\nmodel_type: bert\nmodel_config: {num_hidden_layers: 2, hidden_size: 16, num_attention_heads: 2, "
    "intermediate_size: 32, max_position_embeddings: 32}\n"
)
LLAMA = (
    "task: causal-lm\nmodel_type: llama\nmodel_config: {num_hidden_layers: 2, hidden_size: 16, num_attention_heads: 2, "
    "num_key_value_heads: 1, intermediate_size: 32, max_position_embeddings: 32}\n"
)
MODELS = {"gpt2": GPT2, "bert": BERT, "llama": LLAMA}
TRAINING = """
dataset_name: json
use_cpu: true
max_steps: 3
per_device_train_batch_size: 4
per_device_eval_batch_size: 4
learning_rate: 1e-3
logging_steps: 1
save_strategy: 'no'
disable_tqdm: true
nio: false
nio_batch_size: 8
nio_report_batches: 2
"""


def write_documents(folder: Path, documents: int = 60) -> Path:
    """A file of JSON lines with made-up code."""
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randint(5, 60)))}) for _ in range(documents)]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "documents.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def recipe_of(folder: Path, name: str, *overrides: str, more: str = "") -> Recipe:
    """A recipe that trains a tiny model on such a file."""
    file = write_documents(folder)
    recipe = folder / "recipe.yaml"
    text = f"{MODELS[name]}{TRAINING}data_files: {file}\noutput_dir: {folder / 'output'}\n{more}"
    recipe.write_text(text, encoding="utf-8")
    return load_recipe(str(recipe), overrides)
