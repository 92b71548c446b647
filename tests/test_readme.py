"""What the documents say is so: commands, paths, settings and examples."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

import nio_hf
from nio_hf.recipe.catalog import find_recipe
from nio_hf.recipe.loading import known_keys
from tests.training.toys import ToyImages

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted(ROOT.glob("*.md"))
OPTIONS = {"resolved", "data", "num_processes", "config_file"}
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_exists_and_every_make_target_is_one(document: Path) -> None:
    text = document.read_text()
    for path in re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(
        r"`((?:benchmarks|nio_hf|recipes|tests)(?:/[\w.-]+)*)`", text
    ):
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][a-z-]+)", text)) <= targets


def test_every_recipe_and_setting_of_a_command_exists() -> None:
    commands = [line for line in README.splitlines() if "nio-hf " in line or "nio_hf.train " in line]
    assert commands
    for command in commands:
        for name in re.findall(r"[\w-]+/[\w-]+/[\w-]+(?= |$)", command.split(" --")[0]):
            find_recipe(name)
        for key in re.findall(r" --([a-z_]+)", command):
            assert key in known_keys() or key in OPTIONS, command


def test_public_names_are_those_that_are_exported() -> None:
    for name in re.findall(r"from nio_hf import ([\w, ]+)", README):
        assert set(name.split(", ")) <= set(nio_hf.__all__)
    for name in nio_hf.__all__:
        assert getattr(nio_hf, name).__doc__


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run_as_they_stand(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = EXAMPLES[number].replace(
        "nio_iterations=100,", "nio_iterations=2, max_steps=1, report_to='none', use_cpu=True,"
    )
    code = code.replace("image_size=32,", "image_size=32, num_hidden_layers=1, hidden_size=48, intermediate_size=96,")
    torch.manual_seed(0)
    exec(code, {"train_dataset": ToyImages(400)})
    assert capsys.readouterr().out.strip()


def test_no_path_of_a_machine_and_no_registry_is_named() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    forbidden = re.compile(r"/" r"root/|/" r"home/\w|/" r"work/|pypi\.|download\.pytorch|files\.pythonhosted")
    for name in tracked.stdout.split():
        assert not forbidden.search((ROOT / name).read_text(errors="ignore")), name
