"""From a file and the command line to a recipe."""

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch

from nio_hf.catalog import DEFAULT_RECIPE, find_recipe, recipe_names, split_arguments
from nio_hf.errors import RecipeError
from nio_hf.recipe.keys import GROUPS, known_keys
from nio_hf.recipe.loading import load_recipe

MINIMAL = "model_type: vit\nmodel_config: {image_size: 8, patch_size: 2}\noutput_dir: outputs/x\n"


def _write(path, text):
    file = path / "recipe.yaml"
    file.write_text(text)
    return str(file)


def test_a_recipe_writes_to_a_folder_of_its_name_where_it_names_none(tmp_path):
    path = _write(tmp_path, "base: vit-tiny/digits/nio\n")
    assert load_recipe(path).training.output_dir == "outputs/recipe"
    assert load_recipe("vit-tiny/digits/nio").training.output_dir == "outputs/vit-tiny-digits-nio"
    assert load_recipe(path, ["--output_dir", "here"]).training.output_dir == "here"


def test_every_problem_is_reported_at_once(tmp_path):
    text = "model_type: vti\nlearning_rate: '1e-3'\nnio_gama: 3\nbf16: maybe\n"
    with pytest.raises(RecipeError) as raised:
        load_recipe(_write(tmp_path, text), ["--sede", "1"])
    message = str(raised.value)
    assert "line 2, learning_rate: '1e-3', text. Give a number, without quotes." in message
    assert "line 3, nio_gama: 'nio_gama' is no known key. Did you mean 'nio_gamma'?" in message
    assert "--sede: 'sede' is no known key. Did you mean 'seed'?" in message
    assert "line 4, bf16: 'maybe', text. Give true or false." in message
    assert "line 1, model_type: 'vti' is no architecture of transformers for image-classification" in message
    assert "Did you mean 'vit'?" in message
    assert len(raised.value.problems) == 5


def test_settings_of_a_former_version_are_reported_with_what_replaces_them(tmp_path):
    text = MINIMAL + "nio_scale_sharing: kind\nnio_gama: 3\n"
    with pytest.raises(RecipeError) as raised:
        load_recipe(_write(tmp_path, text), ["--nio_min_scale", "0.1"])
    message = str(raised.value)
    former = "is a setting of a former version. "
    assert f"line 4, nio_scale_sharing: {former}Set nio_groups to additive, model, tensor, or a mapping" in message
    assert f"--nio_min_scale: {former}Set nio_scale_range." in message
    assert "line 5, nio_gama: 'nio_gama' is no known key" in message
    assert len(raised.value.problems) == 3


@pytest.mark.parametrize("value", ["model", '{"positions": "position_embeddings", "rest": "encoder\\\\."}'])
def test_groups_are_a_word_or_a_mapping_in_a_file_and_on_the_command_line(value, tmp_path):
    path = _write(tmp_path, f"{MINIMAL}nio_groups: {value}\n")
    wanted = "model" if value == "model" else {"positions": "position_embeddings", "rest": "encoder\\."}
    for recipe in (load_recipe(path), load_recipe(_write(tmp_path, MINIMAL), ["--nio_groups", value])):
        assert recipe.training.to_nio_config().groups == wanted


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output_dir: x\n", "model_type and model_name_or_path: neither"),
        (MINIMAL + "model_name_or_path: y\n", "model_type and model_name_or_path: both"),
        ("output_dir: x\nmodel_name_or_path: y\nmodel_config: {a: 1}\n", "given beside model_name_or_path"),
        (MINIMAL.replace("image_size: 8", "hidden_size: wide"), r"line 2, model_config\.hidden_size: .*hidden_size"),
        (MINIMAL + "remove_unused_columns: true\n", "line 4, remove_unused_columns: true"),
        (MINIMAL + "train_sampling_strategy: sequential\n", "line 4, train_sampling_strategy: is decided by the task"),
        (MINIMAL + "nio_groups: block\n", "line 4, nio_groups: 'block'. Choose one of additive, .*, or give a mapping"),
        (MINIMAL + "nio_scale_range: [0.5]\n", r"line 4, nio_scale_range: \(0.5,\). Give two finite numbers"),
        (MINIMAL + "lr_scheduler_type: cosin\n", "line 4, lr_scheduler_type: 'cosin'. Choose one of"),
        (MINIMAL + "load_best_model_at_end: true\n", "load_best_model_at_end"),
    ],
)
def test_what_does_not_go_together_is_refused(text, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        load_recipe(_write(tmp_path, text))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"depths": "abc", "embed_dim": "48"}, "--model_config.depths: Validation error for field 'depths'"),
        ({"embed_dim": "48", "depths": "[2,2,2,2,2]"}, "--model_config.depths: windows of 4 are larger"),
        ({"window_size": "3", "embed_dim": "48"}, "--model_config.window_size: windows of 3 do not tile"),
        ({"patch_size": "0", "embed_dim": "48"}, "--model_config.patch_size: 0"),
        ({"depts": "[2]", "embed_dim": "48"}, "--model_config.depts: 'depts' is no known key"),
    ],
)
def test_an_entry_of_the_model_is_named_whatever_stands_behind_it(entries, message):
    options = [part for key, value in entries.items() for part in (f"--model_config.{key}", value)]
    with pytest.raises(RecipeError) as raised:
        load_recipe("swin-tiny/cifar10/nio", ["--use_cpu", "true", *options])
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(("option", "where"), [([], "/nio.yaml, bf16"), (["--bf16", "true"], "--bf16")])
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_bf16_without_a_gpu_says_what_to_give_and_names_no_file_of_a_base(option, where):
    with pytest.raises(RecipeError) as raised:
        load_recipe("swin-small/imagenet-1k/nio", option)
    assert str(raised.value).endswith(f"{where}: this machine has no GPU for it. Give --bf16 false.")


@pytest.mark.parametrize("key", ["nio_seed_optimizer", "optimizer", "eval_split", "resume_from_checkpoint"])
def test_none_is_null_wherever_null_is_allowed(key):
    recipe = load_recipe("vit-tiny/digits/nio", [f"--{key}", "none", "--report_to", "none"])
    holders = (recipe.training, recipe.data, recipe.optimization)
    assert next(getattr(holder, key) for holder in holders if hasattr(holder, key)) is None


def test_recipes_are_found_by_name_and_by_path_and_stand_first_on_the_command_line(tmp_path):
    path = _write(tmp_path, MINIMAL)
    assert find_recipe(path) == Path(path)
    assert find_recipe(DEFAULT_RECIPE).samefile(find_recipe(f"recipes/{DEFAULT_RECIPE}.yaml"))
    assert DEFAULT_RECIPE in recipe_names()
    assert split_arguments(["a.yaml", "--seed", "1"]) == ("a.yaml", ["--seed", "1"])
    assert split_arguments(["--seed", "1"]) == (DEFAULT_RECIPE, ["--seed", "1"])
    assert split_arguments([]) == (DEFAULT_RECIPE, [])


def test_no_key_stands_for_two_things():
    names = [field.name for group in GROUPS for field in dataclasses.fields(group) if field.init]
    assert sorted(names) == sorted(known_keys())


def test_what_can_be_resumed_from_is_said(tmp_path):
    with pytest.raises(RecipeError, match=r"resume_from_checkpoint: True, true or false\. Give auto, a folder"):
        load_recipe("vit-tiny/digits/nio", ["--resume_from_checkpoint", "true"])
    recipe = load_recipe("vit-tiny/digits/nio", ["--resume_from_checkpoint", "auto"])
    assert recipe.training.resume_from_checkpoint == "auto"
    assert recipe.training.enable_jit_checkpoint


def test_other_values_make_another_recipe(tmp_path):
    recipe = load_recipe(_write(tmp_path, MINIMAL + "learning_rate: 1e-3\n"), ["--nio_strength", "0.5"])
    other = recipe.replace({"learning_rate": 2e-3, "model_config.patch_size": 4, "nio_groups": {"trunk": "layers"}})
    assert (other.training.learning_rate, other.training.nio_strength) == (2e-3, 0.5)
    assert other.model.model_config == {"image_size": 8, "patch_size": 4}
    assert other.training.to_nio_config().groups == {"trunk": "layers"}
    assert other.replace({"nio_groups": "model"}).training.nio_groups == "model"
    assert recipe.training.learning_rate == 1e-3


def test_problems_of_other_values_name_their_place_all_at_once(tmp_path):
    recipe = load_recipe(_write(tmp_path, MINIMAL))
    with pytest.raises(RecipeError) as raised:
        recipe.replace({"learning_rate": "high", "nio_gama": 1, "model_config.patch_sise": 4}, "arm steep")
    places = {f"arm steep, {key}" for key in ("learning_rate", "nio_gama", "model_config.patch_sise")}
    assert {problem.where for problem in raised.value.problems} == places


def test_another_process_is_given_a_recipe_whole(tmp_path):
    path = _write(tmp_path, MINIMAL + "global_batch_size: 64\nper_device_train_batch_size: 16\n")
    recipe = load_recipe(path, ["--learning_rate", "2e-3", "--nio_groups", '{"trunk": "layers"}'])
    sent = pickle.dumps(recipe)
    Path(path).unlink()
    again = pickle.loads(sent)
    for part in ("path", "settings", "model", "data"):
        assert getattr(again, part) == getattr(recipe, part)
    assert again.training.to_dict() == recipe.training.to_dict()
    assert again.training.gradient_accumulation_steps == 4
