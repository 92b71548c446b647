"""Small recipes of images and text, with data made by the tests."""

import json
import random

import numpy as np
import torch
from PIL import Image

from nio_hf.recipe.loading import load_recipe

CLASSES = ("bird", "cat", "dog")
IMAGES = """
model_type: vit
model_config:
  image_size: 16
  patch_size: 8
  hidden_size: 16
  num_hidden_layers: 2
  num_attention_heads: 2
  intermediate_size: 32
image_mean: [0.5, 0.4, 0.3]
image_std: [0.2, 0.25, 0.3]
interpolation: bilinear
crop_ratio: 0.8

dataset_name: imagefolder

random_crop: resized
horizontal_flip: 0.5
randaugment_magnitude: 9
randaugment_magnitude_std: 0.5
color_jitter: 0.2
random_erasing: 0.25
mixup_alpha: 0.8
cutmix_alpha: 1.0
label_smoothing_factor: 0.1

nio_batch_size: 8
nio_report_batches: 1

per_device_train_batch_size: 8
max_steps: 4
logging_steps: 1
save_strategy: no
use_cpu: true
disable_tqdm: true
dataloader_pin_memory: false
"""


def make_folder(root, images=12, splits=("train", "validation")):
    """`images` noisy JPEG images of each class, in a folder per split and class; a class has its own brightness."""
    generator = np.random.default_rng(0)
    for split in splits:
        for number, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(images):
                size = generator.integers(18, 30, 2)
                pixels = 60 * number + generator.integers(0, 60, (*size, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.jpg", quality=95)
    return root


def write_recipe(folder, data_dir, more=""):
    """Write a recipe for the images of a folder, with every augmentation, and return its path."""
    file = folder / "recipe.yaml"
    file.write_text(f"{IMAGES}\ndata_dir: {data_dir}\noutput_dir: {folder / 'output'}\n{more}")
    return str(file)


WORDS = ("def", "return", "if", "else", "for", "in", "class", "self", "None", "x", "y", "=", "+", "(", ")", ":")
TEXT_MODELS = {
    "gpt2": "task: causal-lm\nmodel_type: gpt2\nmodel_config: {n_layer: 2, n_embd: 16, n_head: 2, n_positions: 32}\n",
    "bert": "task: masked-lm\nmodel_type: bert\nmodel_config: {num_hidden_layers: 2, hidden_size: 16, "
    "num_attention_heads: 2, intermediate_size: 32, max_position_embeddings: 32}\n",
    "llama": "task: causal-lm\nmodel_type: llama\nmodel_config: {num_hidden_layers: 2, hidden_size: 16, "
    "num_attention_heads: 2, num_key_value_heads: 1, intermediate_size: 32, max_position_embeddings: 32}\n",
}
TEXTS = """
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


def text_recipe(folder, name, *overrides, more="", documents=60):
    """A recipe that trains a tiny model on a file of JSON lines with made-up code."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randint(5, 60)))}) for _ in range(documents)]
    file, recipe = folder / "documents.jsonl", folder / "recipe.yaml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe.write_text(f"{TEXT_MODELS[name]}{TEXTS}data_files: {file}\noutput_dir: {folder / 'output'}\n{more}")
    return load_recipe(str(recipe), overrides)


def weights(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
