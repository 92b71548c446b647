"""`nio-hf compare` from the command line, on digits."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from nio_hf.cli.main import app
from nio_hf.metrics import ACCURACY, IMAGE_CLASSIFICATION, LOSS, METRICS
from nio_hf.study import runner
from nio_hf.study.results import RESULTS_NAME
from tests.study.outcomes import outcome

SMALL = ["--nio_report_batches", "1", "--nio_batch_size", "16"]
SMALL += ["--max_eval_samples", "50", "--max_train_samples", "200"]


def _compare(*arguments):
    done = CliRunner().invoke(app, ["compare", *arguments])
    return done.exit_code, done.output


def _command(directory, options, steps=8):
    start = [sys.executable, "-m", "nio_hf.cli", "compare", "--output_dir", str(directory), "--steps", str(steps)]
    return [*start, *options.split(), *SMALL]


def _records(directory):
    lines = (directory / RESULTS_NAME).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ("--arms nioo --seeds 0 --learning_rates fast", "3 problems: 1. --arms: 'nioo' is no known arm"),
        ("--learning_rates 1e-3,fast", "'fast' is no number"),
        (
            "--arms no_warmup,warmup --budget 359",
            "--budget: 359 training steps. Up to 36 runs of 10 steps, 360 training steps in all: 24 runs to choose",
        ),
        ("--learning_rate 1e-3", "--learning_rate: is decided by this command. Use --learning_rates"),
        ("--nio_method_kwargs.iterations 9", "--nio_method_kwargs.iterations: is decided by this command. Use --arm"),
        ("--nio_max_loss_rise 0.1", "--nio_max_loss_rise: is a setting of a former version. Set nio_loss_bound"),
        ("--weight_decoy 1", "'weight_decoy' is no known key"),
        ("--arm x=nio,nio_gama=1", "arm x, nio_gama"),
        ("--steps 0", "--steps: 0. Give the training steps of a run"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, arguments, found):
    directory = tmp_path / "new"
    steps = "" if "--steps" in arguments else "--steps 10"
    status, output = _compare(*arguments.split(), *steps.split(), "--output_dir", str(directory))
    assert status == 2
    assert found in " ".join(output.split())
    assert not (directory / RESULTS_NAME).exists()


def test_an_optimizer_in_the_file_of_a_recipe_is_refused(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: vit-tiny/digits/nio\noptimizer: muon\n")
    status, output = _compare(str(recipe), "--steps", "10", "--output_dir", str(tmp_path / "new"))
    assert status == 2
    found = "line 2, optimizer: 'muon', and each arm of a comparison has an optimizer of its own"
    assert found in " ".join(output.split())


@pytest.mark.slow
def test_a_comparison_from_the_grid_to_the_verdict(tmp_path):
    options = "--arms no_warmup,warmup,nio_seeded --learning_rates 1e-3,2e-3 --jobs 2 --diagnostics"
    command = _command(tmp_path, options)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = _records(tmp_path)
    runs = [json.dumps(record["run"]) for record in records]
    assert len(runs) == len(set(runs)) == 3 * 2 * 3 + 3 * 3
    assert "[27/27]" in done.stderr
    for record in records:
        run, outcome = record["run"], record["outcome"]
        seeded = run["arm"] == "nio_seeded"
        assert (outcome["cost_steps"] > 0) == seeded
        assert outcome["steps"] == 8 - -(-outcome["cost_steps"] // 1)
        assert len(outcome["losses"]) == outcome["steps"]
        assert len(outcome["diagnostics"]["angular_update"]) == outcome["steps"]
    of_seed_0 = [record for record in records if record["run"]["seed"] == 0]
    first = {(r["run"]["arm"], r["run"]["learning_rate"]): r["outcome"]["losses"][0] for r in of_seed_0}
    # Runs of one seed start from the same weights and the same batch.
    assert first["no_warmup", 1e-3] == first["warmup", 1e-3] == first["no_warmup", 2e-3]
    for name in ("comparison.md", "comparison.json", "learning_rates.png", "first_steps.png"):
        assert (tmp_path / name).stat().st_size > 0
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert _records(tmp_path) == records


@pytest.mark.slow
def test_killed_and_started_again_it_goes_on_and_counts_nothing_twice(tmp_path):
    command = _command(tmp_path, "--arms no_warmup,warmup --learning_rates 1e-3 --seeds 3 --no_verdict")
    file = tmp_path / RESULTS_NAME
    for number in (signal.SIGKILL, signal.SIGINT):
        before = len(_records(tmp_path)) if file.exists() else 0
        with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as process:
            deadline = time.monotonic() + 120
            while not (file.exists() and len(_records(tmp_path)) > before) and time.monotonic() < deadline:
                time.sleep(0.1)
            os.kill(process.pid, number)
            process.wait(60)
        assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs = [json.dumps(record["run"]) for record in _records(tmp_path)]
    assert len(runs) == len(set(runs)) == 6


@pytest.mark.slow
def test_sigterm_leaves_no_temporary_folder(tmp_path):
    command = _command(tmp_path, "--arms no_warmup --learning_rates 1e-3 --no_verdict", steps=100_000)
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob("runs/*.log")) and time.monotonic() < deadline:
            time.sleep(0.1)
        begun = list(tmp_path.glob("runs/.nio-trial-*"))
        process.terminate()
        process.wait(60)
    assert begun
    assert process.returncode == 128 + signal.SIGTERM
    assert [path.suffix for path in (tmp_path / "runs").iterdir()] == [".log"]


@pytest.mark.parametrize(("metric", "failed"), [(ACCURACY, 100 / 10), (LOSS, math.log(10))])
def test_the_command_judges_by_the_metric_of_the_recipe(metric, failed, tmp_path, monkeypatch):
    def execute(pending, order_for, jobs, on_outcome):
        """Values rise with the rate, and fall with it where there is warmup; NIO fails at the higher rate."""
        for run in pending:
            rise = 250 * (run.learning_rate - 1e-3) * (-1 if run.arm == "warmup" else 1)
            failed = (run.arm, run.learning_rate) == ("nio", 2e-3)
            on_outcome(run, outcome(None if failed else 0.75 + rise + 0.125 * run.seed % 1))

    monkeypatch.setitem(METRICS, IMAGE_CLASSIFICATION, metric)
    monkeypatch.setattr(runner, "execute", execute)
    arguments = ["vit-tiny/digits/nio", "--steps", "100", "--learning_rates", "1e-3,2e-3"]
    status, text = _compare(*arguments, "--output_dir", str(tmp_path))
    assert status == 0, text
    output = " ".join(text.split())
    assert f"{metric.heading} by learning rate" in output
    assert f"no_warmup-lr0.001-s0: {metric.name} {metric.text(0.75)}" in output
    assert ("accura" in output.lower()) == metric.is_share
    found = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    values = {(cell["arm"], cell["learning_rate"]): cell["value"] for cell in found["cells"]}
    assert values["nio", 2e-3] == pytest.approx(failed)
    higher = {choice["arm"] for choice in found["chosen"] if choice["learning_rate"] == 2e-3}
    assert higher == ({"warmup"} if metric.lower_is_better else {"no_warmup", "nio"})
