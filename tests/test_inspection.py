"""`nio-hf inspect` and `nio-hf report`: measurements by layer of models and recipes, and pages of runs."""

import json
import math
import shutil

import pytest
import torch
from typer.testing import CliRunner

from nio_hf import NIOTrainer
from nio_hf.cli.main import app
from nio_hf.errors import RecipeError
from nio_hf.hub.run_folder import read_run
from nio_hf.inspection import run_inspection
from nio_hf.recipe.loading import load_recipe, recipe_yaml
from nio_hf.train import initialise, train
from nio_hf.trainer.digests import fingerprint
from tests.trainer.toys import ToyImages, arguments, build, load_state

RECIPE = "vit-tiny/digits/nio"
SMALL = ["--use_cpu", "true", "--disable_tqdm", "true", "--max_steps", "4"]


def options(output_dir, *more):
    return [*SMALL, "--model_config.num_hidden_layers", "2", "--output_dir", str(output_dir), *more]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("trained")
    train(load_recipe(RECIPE, options(output_dir)))
    return output_dir


def inspected(directory):
    assert (directory / "inspection.png").stat().st_size > 10_000
    found = json.loads((directory / "inspection.json").read_text())
    total = math.fsum(layer["contribution"] for layer in found["layers"])
    assert total == pytest.approx(found["measured"]["value"], abs=1e-6)
    return found


def test_a_recipe_is_measured_as_nio_finds_it(tmp_path, capsys):
    assert run_inspection([RECIPE, *options(tmp_path)]) == 0
    found = inspected(tmp_path / "inspect-init")
    before = initialise(load_recipe(RECIPE, options(tmp_path))).result.before
    assert found["measured"]["value"] == before.value
    assert found["measured"]["grad_norm"] == before.grad_norm
    shown = capsys.readouterr().out
    assert f"{before.value:.4f} ± {before.standard_error:.4f}" in shown
    assert "By kind" in shown
    assert "By depth" in shown
    assert str(tmp_path / "inspect-init" / "inspection.json") in shown


def test_an_initialised_checkpoint_is_measured_as_nio_left_it(trained):
    assert run_inspection([str(trained / "_nio_init"), "--use_cpu", "true"]) == 0
    found = inspected(trained / "_nio_init" / "inspect")
    after = load_state(trained / "_nio_init").after
    assert found["measured"]["value"] == pytest.approx(after.value, abs=1e-6)
    assert read_run(trained / "_nio_init").inspection is not None


def test_a_trained_model_is_measured_on_the_data_of_its_recipe(trained):
    assert run_inspection([str(trained), "--use_cpu", "true"]) == 0
    found = inspected(trained / "inspect")
    assert found["steps"] == 4
    assert found["measured"]["value"] != load_state(trained / "_nio_init").after.value
    assert read_run(trained).inspection.measured.value == found["measured"]["value"]


def test_each_sample_can_be_its_own_sub_batch(trained, tmp_path):
    sizes = ["--nio_batch_size", "16", "--nio_sub_batches", "16", "--nio_report_batches", "1"]
    assert run_inspection([str(trained), "--use_cpu", "true", "--output_dir", str(tmp_path), *sizes]) == 0
    assert len(inspected(tmp_path / "inspect")["measured"]["norms"]) == 16


def test_a_model_without_a_recipe_needs_a_data_set(trained, tmp_path, capfd):
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copy(trained / name, tmp_path / name)
    assert run_inspection([str(tmp_path), "--use_cpu", "true"]) == 2
    assert "there is no nio_recipe.yaml beside the model. Say what to measure it on" in capfd.readouterr().err
    assert run_inspection([str(tmp_path), "--use_cpu", "true", "--dataset_name", "digits"]) == 0
    assert inspected(tmp_path / "inspect")["steps"] == 0


def test_what_holds_no_model_or_recipe_is_said(tmp_path, capfd):
    assert run_inspection(["vit-tiny/digits/nope"]) == 2
    assert "no such recipe file" in capfd.readouterr().err
    assert run_inspection([str(tmp_path)]) == 1
    assert "no model in it. Give an output_dir" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["vit", "swin", "resnet"])
def test_the_trainer_inspects_any_model_and_changes_nothing(name, tmp_path):
    args = arguments(tmp_path, nio_sub_batches=4)
    trainer = NIOTrainer(model=build(name), args=args, train_dataset=ToyImages())
    weights, drawn = fingerprint(trainer.model), torch.get_rng_state()
    first, second = trainer.inspect(), trainer.inspect()
    assert first == second
    assert fingerprint(trainer.model) == weights
    assert torch.equal(torch.get_rng_state(), drawn)
    assert trainer.run_nio().before == first.measured


def test_the_recipe_that_is_saved_runs_and_keeps_no_secret(tmp_path):
    given = ["--hub_token", "hf_secret", "--push_to_hub", "user/model", "--resume_from_checkpoint", "auto"]
    text = recipe_yaml(load_recipe(RECIPE, options(tmp_path / "run", *given)))
    assert "hf_secret" not in text
    (tmp_path / "recipe.yaml").write_text(text)
    again = load_recipe(str(tmp_path / "recipe.yaml"))
    assert again.training.output_dir == str(tmp_path / "run"), "here it runs as it did"
    assert not again.training.push_to_hub
    assert again.model.model_config["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("given", "push", "name"),
    [
        (["--push_to_hub", "user/model"], True, "user/model"),
        (["--push_to_hub"], True, None),
        (["--push_to_hub", "false"], False, None),
        (["--push_to_hub", "true", "--hub_model_id", "user/other"], True, "user/other"),
    ],
)
def test_push_to_hub_takes_a_name(given, push, name, tmp_path):
    training = load_recipe(RECIPE, options(tmp_path, *given)).training
    assert (training.push_to_hub, training.hub_model_id) == (push, name)


def test_a_name_on_the_command_line_goes_before_that_of_the_recipe_and_beside_another_is_refused(tmp_path):
    given = ["--push_to_hub", "user/one", "--hub_model_id", "user/two"]
    with pytest.raises(RecipeError, match=r"'user/one' beside hub_model_id 'user/two'\. Name one"):
        load_recipe(RECIPE, options(tmp_path, *given))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"base: {RECIPE}\npush_to_hub: true\nhub_model_id: user/one\n")
    assert load_recipe(str(recipe), ["--push_to_hub", "user/two"]).training.hub_model_id == "user/two"


def test_a_report_of_a_folder(trained, tmp_path):
    runner = CliRunner()
    shown = runner.invoke(app, ["report", str(trained)])
    assert shown.exit_code == 0
    assert f"Report: {trained / 'report.html'}" in shown.output
    assert "was trained for 4 steps" in (trained / "report.html").read_text()
    other = tmp_path / "pages" / "a.html"
    assert runner.invoke(app, ["report", str(trained / "_nio_init"), "--output", str(other)]).exit_code == 0
    assert "not a trained model" in other.read_text()
    assert runner.invoke(app, ["report", str(tmp_path / "nowhere")]).exit_code == 1
