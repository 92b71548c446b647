"""`nio-hf tune` from the command line, on digits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nio_hf.cli.main import app
from nio_hf.recipe.settings import known_keys
from nio_hf.trials.results import RESULTS_NAME
from nio_hf.tuning.plan import DECIDED

SMALL = ["--nio_report_batches", "1", "--nio_batch_size", "16"]
SMALL += ["--max_eval_samples", "50", "--max_train_samples", "200"]
GRID = ["--groups", "additive,model", "--strengths", "0.5,0.75"]


def _tune(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["tune", *arguments])
    return done.exit_code, " ".join(done.output.split())


def test_what_a_search_decides_are_settings_of_a_recipe() -> None:
    assert DECIDED.keys() <= known_keys().keys()


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--groups", ""], "--groups: none"),
        (["--groups", "model,block"], "--groups: model, block. Give at least one of additive, model, each once"),
        (["--strengths", "0.5,half"], "--strengths: 'half' is no number"),
        (["--strengths", "50%"], "--strengths: '50%' is no number"),
        (["--strengths", "0.5,0.50"], "--strengths: 0.5, 0.5. Give different ones above 0"),
        (["--strengths", "0"], "--strengths: 0. Give different ones above 0"),
        (["--nio_search", "published"], "nio_search: published. Set nio_search to balance"),
        (["--nio_gamma_relative", "2"], "--nio_gamma_relative: is a setting of a former version. Set nio_least_norm"),
        (["--verdict_seeds", "2"], "Give 3 or more to judge by, or --no_verdict"),
        (["--probe_steps", "200"], "--probe_steps: 200, of whole trainings of 100"),
        (["--warmup_steps", "5"], "--warmup_steps: is decided by this command"),
        (["--nio_method", "lsuv"], "only NIO is tuned"),
        (["--nio_gama", "1"], "'nio_gama' is no known key"),
        (["--budget", "100"], "--budget: 100 training steps, where the first round takes up to"),
        (["--steps", "2", "--probe_steps", "2"], "--steps: 2, where the initialisation takes up to 2"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path: Path, arguments: list[str], found: str) -> None:
    directory = tmp_path / "new"
    status, output = _tune("--steps", "100", "--output_dir", str(directory), *GRID, *SMALL, *arguments)
    assert status == 2
    assert found in output
    assert not (directory / RESULTS_NAME).exists()


def test_results_of_a_comparison_are_not_those_of_a_search(tmp_path: Path) -> None:
    header = {"format": 2, "task": {"recipe": "vit-tiny/digits/nio", "steps": 30, "settings": {}}}
    (tmp_path / RESULTS_NAME).write_text(json.dumps(header) + "\n", encoding="utf-8")
    status, output = _tune("--steps", "30", "--probe_steps", "8", "--output_dir", str(tmp_path), *GRID, *SMALL)
    assert status == 2
    assert "holds the results of nio-hf compare, and this is nio-hf tune" in output


@pytest.mark.slow
def test_a_search_from_the_probes_to_the_judgement(tmp_path: Path) -> None:
    start = [sys.executable, "-m", "nio_hf.cli", "tune", "--output_dir", str(tmp_path)]
    command = [*start, "--steps", "20", "--probe_steps", "4", "--seeds", "2", "--verdict_seeds", "3", *GRID, *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "8 probes in 2 rounds (5, 3 candidates): up to" in done.stderr
    lines = (tmp_path / RESULTS_NAME).read_text(encoding="utf-8").splitlines()[1:]
    records = [json.loads(line) for line in lines]
    names = [json.dumps(record["run"]) for record in records]
    assert len(names) == len(set(names))
    for record in records:
        outcome, share = record["outcome"], {"probe": 0.2, "verdict": 1.0}[record["run"]["stage"]]
        budget = 4 if record["run"]["stage"] == "probe" else 20
        assert outcome["steps"] == budget - -(-outcome["cost_steps"] * share // 1)
        assert outcome["initialisation"]["cost"] > 0
        groups = outcome["initialisation"]["scales_by_group"]
        assert set(groups.values()) == set(outcome["initialisation"]["scales"])
        assert len(groups) == 1 or record["run"]["arm"].startswith(("additive", "own"))
    found = json.loads((tmp_path / "tuning.json").read_text(encoding="utf-8"))
    assert len(records) == 8 + (0 if found["chosen"] == "own" else 6)
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert (tmp_path / RESULTS_NAME).read_text(encoding="utf-8").splitlines()[1:] == lines
