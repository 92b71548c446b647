"""`nio-hf recipes`: list, show and copy."""

import pytest
import yaml
from typer.testing import CliRunner

from nio_hf.catalog import accelerate_config_names, describe, find_accelerate_config, find_recipe, recipe_names
from nio_hf.cli.main import app
from nio_hf.recipe.layering import read_layers

RUNNER = CliRunner()
NAME = "vit-base/imagenet-1k/nio"


def test_every_recipe_is_listed_with_what_it_is():
    shown = RUNNER.invoke(app, ["recipes"], env={"COLUMNS": "200"}).output
    for name in recipe_names():
        assert any(line.split()[0] == name and describe(name) in line for line in shown.splitlines() if line.strip()), (
            name
        )
    assert ", ".join(accelerate_config_names()) in shown
    config = RUNNER.invoke(app, ["recipes", "show", "accelerate_configs/multi_gpu"]).output
    assert config == find_accelerate_config("multi_gpu").read_text()


def test_a_recipe_is_shown_as_it_is_and_with_the_settings_of_its_base():
    assert RUNNER.invoke(app, ["recipes", "show", NAME]).output == find_recipe(NAME).read_text()
    resolved = yaml.safe_load(RUNNER.invoke(app, ["recipes", "show", NAME, "--resolved"]).output)
    assert resolved == {key: setting.value for key, setting in read_layers(find_recipe(NAME)).items()}


def test_a_copy_goes_where_it_is_told_and_replaces_nothing_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = RUNNER.invoke(app, ["recipes", "copy", NAME])
    assert shown.output == "Copied to vit-base-imagenet-1k-nio.yaml\n"
    copied = tmp_path / "vit-base-imagenet-1k-nio.yaml"
    assert copied.read_bytes() == find_recipe(NAME).read_bytes()
    assert len(read_layers(copied)) == len(read_layers(find_recipe(NAME)))
    copied.write_text("mine")
    refused = RUNNER.invoke(app, ["recipes", "copy", NAME])
    assert refused.exit_code == 2
    assert "exists already. Give another file, or --force" in refused.output
    assert copied.read_text() == "mine"
    assert RUNNER.invoke(app, ["recipes", "copy", NAME, "--force"]).exit_code == 0
    assert copied.read_bytes() == find_recipe(NAME).read_bytes()
    assert RUNNER.invoke(app, ["recipes", "copy", NAME, "other.yaml"]).exit_code == 0
    assert (tmp_path / "other.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["show", "vit-bse/imagenet-1k/nio"], 2, "vit-base/imagenet-1k/nio"),
        (["copy", "nothing"], 2, "no such recipe file"),
        (["copy", NAME, "missing/folder/x.yaml"], 1, "Give a file that you can write"),
    ],
)
def test_what_cannot_be_shown_or_copied_is_a_message(arguments, status, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = RUNNER.invoke(app, ["recipes", *arguments])
    assert shown.exit_code == status
    assert message in shown.output
