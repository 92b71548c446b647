"""Ranges, sizes that do not fit, and settings that contradict each other."""

import json
import re

import pytest

from nio_hf.errors import RecipeError
from nio_hf.recipe.loading import accumulation_steps, check_world_size, load_recipe
from nio_hf.recipe.strict_yaml import Setting

MINIMAL = "model_type: vit\nmodel_config: {image_size: 8, patch_size: 2}\noutput_dir: outputs/x\n"
SWIN = "model_type: swin\noutput_dir: outputs/x\nmodel_config:\n  depths: [1, 1]\n  num_heads: [1, 1]\n"


def write(folder, text, name="recipe"):
    (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{name}.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("horizontal_flip: 1.5", "line 4, horizontal_flip: 1.5. Give a number in [0, 1]"),
        ("crop_ratio: 0.0", "crop_ratio: 0.0. Give a number in (0, 1]"),
        ("crop_scale: [0.5, 0.1]", "crop_scale: [0.5, 0.1]. Give two rising numbers"),
        ("weight_decay: .inf", "line 4, weight_decay: inf. Give a finite number"),
        ("ema_decay: 0", "line 4, ema_decay: 0. Give a number in (0, 1), or null"),
        ("image_mean: [0.5, 0.5]", "image_mean: [0.5, 0.5]. Give three numbers"),
        ("image_std: [0.5, 0.5, 0.0]", "line 4, image_std[2]: 0.0. Give a number above 0"),
        ("ema_decay: 1.0", "ema_decay: 1.0. Give a number in (0, 1)"),
        ("random_crop: centre", "random_crop: 'centre'. Choose one of none, resized, padded"),
        ("streaming: true", "streaming: without max_steps"),
        ("streaming: true\nmax_steps: 5\nrepeated_augmentation: 3", "repeated_augmentation: given with streaming"),
        ("global_batch_size: 8\ngradient_accumulation_steps: 2", "given beside global_batch_size"),
        ("image_size: 16", "image_size: 16. Set image_size in the model_config: vit has one there"),
        ("global_batch_size: 8\nauto_find_batch_size: true", "auto_find_batch_size: given beside global_batch_size"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size: 0. Give a whole number of at least 1"),
        ("learning_rate: -1", "learning_rate: -1. Give a number of at least 0"),
        ("seed: -1", "line 4, seed: -1. Give a whole number in [0, 4294967296)"),
        ("label_names: [labels]", "label_names: is decided by the task"),
        ("optim_args: momentum", "line 4, optim_args: "),
        ("optim: lomo", "Install it, or choose another optim"),
        ("lr_scheduler_kwargs: {foo: 1}", "line 4, lr_scheduler_kwargs: "),
        ("lr_scheduler_type: cosine_with_min_lr", "line 4, lr_scheduler_type: "),
        ("deepspeed: nowhere.json", "line 4, deepspeed: cannot be read"),
        ("global_batch_size: 12", "12 is no multiple of 8 samples on one process"),
    ],
)
def test_a_setting_that_cannot_be_is_an_error_with_its_place(text, message, tmp_path):
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(write(tmp_path, f"{MINIMAL}{text}\nuse_cpu: true\n"))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("image_size: 30\n  patch_size: 4\n  window_size: 7", "image_size 30 is no multiple of patch_size 4"),
        ("image_size: 20\n  patch_size: 4\n  window_size: 5", "the feature map of stage 2 has no whole side: 5 / 2"),
        ("image_size: 32\n  patch_size: 4\n  window_size: 3", "windows of 3 do not tile the 8 x 8 feature map"),
        ("image_size: 32\n  patch_size: 4\n  window_size: 8", "windows of 8 are larger than the 4 x 4 feature map"),
    ],
)
def test_images_that_patches_and_windows_do_not_tile_are_refused(sizes, message, tmp_path):
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(write(tmp_path, f"{SWIN}  {sizes}\n"))
    load_recipe(write(tmp_path, f"{SWIN}  image_size: 32\n  patch_size: 4\n  window_size: 4\n"))


@pytest.mark.parametrize("as_file", [True, False])
def test_a_warmup_scheduler_of_deepspeed_is_warmup(as_file, tmp_path):
    config = {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 100}}}
    (tmp_path / "deepspeed.json").write_text(json.dumps(config))
    setting = str(tmp_path / "deepspeed.json") if as_file else json.dumps(config)
    with pytest.raises(RecipeError, match="its WarmupDecayLR warms up for 100 steps, but warmup_steps is 0"):
        load_recipe(write(tmp_path, f"{MINIMAL}deepspeed: {setting}\n"))


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    check_world_size(3)
    with pytest.raises(RecipeError, match="3 processes, of which each would train alone"):
        check_world_size(1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("--model_config.num_channels 1", ".num_channels: 1. Give 3: all images become RGB"),
        ("--model_config.num_labels 7", ".num_labels: is decided by the data set"),
    ],
)
def test_a_model_that_does_not_fit_the_images_is_refused(overrides, message, tmp_path):
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(write(tmp_path, MINIMAL), overrides.split())
    load_recipe(write(tmp_path, MINIMAL), ["--model_name_or_path", "null"])


@pytest.mark.parametrize(
    ("total", "size", "processes", "steps"), [(1024, 128, 8, 1), (1024, 128, 2, 4), (1024, 64, 1, 16), (12, 3, 4, 1)]
)
def test_accumulation_follows_from_the_global_batch(total, size, processes, steps):
    assert accumulation_steps(Setting(total, "g"), size, processes) == steps


@pytest.mark.parametrize(
    ("total", "size", "processes", "fix"),
    [
        (1024, 128, 3, "Choose a global_batch_size that 3 processes can share"),
        (1024, 100, 4, "Set per_device_train_batch_size to 64, or another divisor of 256"),
        (100, 64, 2, "Set per_device_train_batch_size to 50, or another divisor of 50"),
    ],
)
def test_a_global_batch_that_cannot_be_shared_is_an_error(total, size, processes, fix):
    with pytest.raises(RecipeError) as raised:
        accumulation_steps(Setting(total, "file, line 1, global_batch_size"), size, processes)
    assert fix in str(raised.value)
    assert f"{total} is no multiple of {size} samples on each of {processes} processes" in str(raised.value)
