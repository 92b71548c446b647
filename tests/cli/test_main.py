"""The `nio-hf` command: arguments and imports."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import nio_hf
from nio_hf.cli.main import app
from nio_hf.train import initialise
from nio_hf.train import train as train_recipe

RUNNER = CliRunner()


@pytest.mark.parametrize(("command", "action"), [("train", train_recipe), ("init", initialise)])
def test_commands_pass_the_recipe_and_its_overrides_on(command, action, monkeypatch):
    calls = []
    monkeypatch.setattr("nio_hf.train.run_recipe", lambda *call: calls.append(call) or 3)
    options = ["vit-tiny/digits/nio", "--nio_lr", "-1e-3", "--seed=4", "--bf16"]
    assert RUNNER.invoke(app, [command, *options]).exit_code == 3
    assert RUNNER.invoke(app, [command, "--seed", "1"]).exit_code == 3
    assert RUNNER.invoke(app, [command]).exit_code == 3
    assert calls == [(action, options), (action, ["--seed", "1"]), (action, [])]


def test_init_on_the_cpu_is_an_override_like_any_other(monkeypatch):
    calls = []
    monkeypatch.setattr("nio_hf.train.run_recipe", lambda *call: calls.append(call) or 0)
    for device in ("cpu", "auto"):
        assert RUNNER.invoke(app, ["init", "--seed", "1", "--device", device]).exit_code == 0
    assert [options for _, options in calls] == [["--seed", "1", "--use_cpu", "true"], ["--seed", "1"]]


def test_help_and_version():
    text = RUNNER.invoke(app, ["--help"]).output
    commands = ("train", "init", "validate", "inspect", "report", "push", "compare", "tune", "recipes")
    assert all(command in text for command in commands)
    assert "vit-tiny/digits/nio" in RUNNER.invoke(app, ["train", "--help"]).output
    assert RUNNER.invoke(app, ["--version"]).output == f"nio-hf {nio_hf.__version__}\n"
    assert RUNNER.invoke(app, ["fly"]).exit_code == 2
    refused = RUNNER.invoke(app, ["init", "--device", "x"])
    assert refused.exit_code == 2
    assert "auto" in refused.output


def test_the_command_line_loads_no_torch_before_it_is_needed():
    code = "import sys, nio_hf.cli.main as m; sys.argv[1:] = ['recipes']; m.app(standalone_mode=False);"
    code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split()[-2:] == ["False", "False"]


def test_the_installed_program_is_this_one():
    program = Path(sys.executable).with_name("nio-hf")
    shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"nio-hf \d+\.\d+\.\d+\n", shown)
