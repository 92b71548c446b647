"""YAML 1.2 scalars, places for messages, and options of the command line."""

import math
import re

import pytest

from nio_hf.errors import RecipeError
from nio_hf.recipe.strict_yaml import parse_scalar, read_overrides, read_settings


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("010", 10),
        ("no", "no"),
        ("null", None),
        ("", None),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("'1e-3'", "1e-3"),
        ("{a: 1}", {"a": 1}),
        ("photos #2", "photos #2"),
        ("# x", "# x"),
        ("'a' # b", "a"),
        ("12e4567", "12e4567"),
        (".inf", math.inf),
    ],
)
def test_scalars_are_those_of_yaml_1_2_and_dates_stay_text(text, value):
    parsed = parse_scalar(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)


def test_settings_know_their_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("# comment\nseed: 1\n\nlearning_rate: 1e-3\n")
    settings = read_settings(path)
    assert settings["learning_rate"].value == 1e-3
    assert settings["learning_rate"].where == f"{path}, line 4, learning_rate"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1\nb: 2\n", r"line 2: not YAML"),
        ("a: 1\nb: 2\na: 3\n", r"line 3: not YAML: found duplicate key .a."),
        ("a: {b: 1, b: 2}\n", r"found duplicate key .b."),
        ("- 1\n- 2\n", r"list instead of settings"),
        ("", r"NoneType instead of settings"),
        ("1: 2\n", r"instead of settings"),
        ("a: !!python/object/apply:os.getcwd []\n", r"not YAML"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_line(content, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=message) as raised:
        read_settings(path)
    assert str(path) in str(raised.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        read_settings(tmp_path / "missing.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_settings(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_settings(tmp_path / "binary.yaml")


def test_options_become_settings():
    options = ["--learning-rate", "1e-3", "--seed=4", "--bf16", "--nio", "false", "--nio_lr", "-1", "--name=a=b"]
    settings = read_overrides(options)
    values = {key: setting.value for key, setting in settings.items()}
    assert values == {"learning_rate": 1e-3, "seed": 4, "bf16": True, "nio": False, "nio_lr": -1, "name": "a=b"}
    assert settings["learning_rate"].where == "--learning-rate"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["seed", "3"], "seed: not a setting"),
        (["-s", "3"], "-s: not a setting"),
        (["--seed", "3", "4"], "4: not a setting"),
        (["--seed", "3", "--seed", "4"], "--seed: given twice"),
        (["--seed", "[1"], "--seed: not YAML"),
    ],
)
def test_options_of_another_form_are_refused(options, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        read_overrides(options)
