"""A recipe over its base, the command line over both."""

import re

import pytest
import yaml

from nio_hf.catalog import find_recipe
from nio_hf.errors import RecipeError
from nio_hf.recipe.layering import merge, read_layers, settings_yaml
from nio_hf.recipe.loading import load_recipe
from nio_hf.recipe.strict_yaml import Setting

BASE = "model_type: vit\nmodel_config: {image_size: 8, patch_size: 2}\noutput_dir: outputs/x\nlearning_rate: 1e-3\n"


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def values(settings):
    return {key: setting.value for key, setting in settings.items()}


def test_the_command_line_goes_before_the_recipe_that_before_its_base_and_model_config_is_merged(tmp_path):
    child = "base: parent.yaml\nlearning_rate: 2e-3\nmodel_config: {patch_size: 4}\n"
    path = write(tmp_path, child=child, parent="base: root.yaml\nseed: 3\n", root=BASE)
    found = read_layers(path)
    assert values(found) == {
        "model_type": "vit",
        "model_config": {"image_size": 8, "patch_size": 4},
        "output_dir": "outputs/x",
        "learning_rate": 2e-3,
        "seed": 3,
    }
    assert found["learning_rate"].where.startswith(str(path))
    assert str(tmp_path / "parent.yaml") in found["seed"].where
    recipe = load_recipe(str(path), ["--learning_rate", "3e-3", "--model_config.patch_size=8"])
    assert (recipe.training.learning_rate, recipe.training.seed) == (3e-3, 3)
    assert recipe.model.model_config == {"image_size": 8, "patch_size": 8}
    assert (recipe.training.warmup_steps, recipe.training.remove_unused_columns) == (0, False), "defaults"
    assert recipe.data.dataset_name == "digits"


def test_a_base_may_be_a_recipe_that_comes_with_the_package(tmp_path):
    path = write(tmp_path, mine="base: vit-tiny/digits/nio\nseed: 7\n")
    own, shipped = read_layers(path), read_layers(find_recipe("vit-tiny/digits/nio"))
    assert values(own) == {**values(shipped), "seed": 7}


def test_another_architecture_starts_from_an_empty_configuration(tmp_path):
    path = write(tmp_path, child="base: root.yaml\nmodel_type: swin\nmodel_config: {embed_dim: 8}\n", root=BASE)
    assert read_layers(path)["model_config"].value == {"embed_dim": 8}
    same = merge(read_layers(tmp_path / "root.yaml"), {"model_type": Setting("vit", "--model_type")})
    assert same["model_config"].value == {"image_size": 8, "patch_size": 2}


def test_another_optimiser_or_schedule_starts_without_the_arguments_of_the_former(tmp_path):
    root = BASE + "optim: sgd\noptim_args: momentum=0.9\nlr_scheduler_type: cosine_with_min_lr\n"
    path = write(tmp_path, root=root + "lr_scheduler_kwargs: {min_lr: 1e-5}\n")
    recipe = load_recipe(str(path), ["--lr_scheduler_type", "linear", "--optim", "adamw_torch"])
    assert recipe.training.lr_scheduler_kwargs in (None, {})
    assert recipe.training.optim_args is None
    kept = load_recipe(str(path), ["--lr_scheduler_type", "cosine_with_min_lr"])
    assert kept.training.lr_scheduler_kwargs == {"min_lr": 1e-5}


def test_a_loaded_model_brings_its_configuration_and_image_processor(tmp_path):
    root = BASE + "image_mean: [0.1, 0.2, 0.3]\ncrop_ratio: 0.9\ndrop_path_rate: 0.1\n"
    path = write(tmp_path, child="base: root.yaml\nmodel_name_or_path: somewhere\n", root=root)
    assert set(read_layers(path)) == {"model_name_or_path", "output_dir", "learning_rate", "drop_path_rate"}


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nowhere.yaml", "line 1, base: 'nowhere.yaml' is no recipe"),
        ("vit-tny/digits/nio", "vit-tiny/digits/nio"),
        ("[a, b]", "Name one recipe"),
        ("mine.yaml", "line 1, base: 'mine.yaml' leads back to this recipe"),
        ("other.yaml", "other.yaml, line 1, base: 'mine.yaml' leads back"),
    ],
)
def test_a_base_that_cannot_be_one_is_refused(base, message, tmp_path):
    path = write(tmp_path, mine=f"base: {base}\n" + BASE, other="base: mine.yaml\n")
    with pytest.raises(RecipeError, match=re.escape(message)):
        read_layers(path)


def test_a_resolved_recipe_is_the_same_recipe_in_one_file(tmp_path):
    shipped = find_recipe("vit-base/imagenet-1k/nio")
    text = settings_yaml(read_layers(shipped))
    assert "base:" not in text.splitlines()
    path = write(tmp_path, resolved=text)
    assert values(read_layers(path)) == values(read_layers(shipped))
    assert yaml.safe_load(text)["global_batch_size"] == 1024


@pytest.mark.parametrize("text", ["1e3", "12e4567", "0o17", "+.5", "no", "1:30", "null", "~", "a: b", "# x", "x y", ""])
def test_a_text_is_read_as_it_was_written_by_either_version_of_yaml(text, tmp_path):
    written = settings_yaml({"data_dir": Setting(text, "here")})
    assert values(read_layers(write(tmp_path, recipe=written))) == {"data_dir": text}
    assert yaml.safe_load(written) == {"data_dir": text}


def test_a_base_is_looked_for_in_the_folder_of_its_recipe_alone(tmp_path, monkeypatch):
    outside = tmp_path / "outside.yaml"
    outside.write_text(BASE)
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "root.yaml").write_text(BASE)
    (folder / "link.yaml").symlink_to(outside)
    recipe = folder / "recipe.yaml"
    for base in ("../outside.yaml", "inner/../../outside.yaml", str(outside), "link.yaml"):
        recipe.write_text(f"base: {base}\n")
        with pytest.raises(RecipeError, match=r"line 1, base: .* leads out of the folder of the recipe\. Put the base"):
            read_layers(recipe)
    recipe.write_text("base: inner/../inner/root.yaml\n")
    assert read_layers(recipe)
    monkeypatch.chdir(folder / "inner")
    recipe.write_text("base: root.yaml\n")
    with pytest.raises(RecipeError, match="is no recipe"):
        read_layers(recipe)
