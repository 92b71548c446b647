"""SIGTERM and Ctrl-C reach a training through the launcher, and its exit status comes back."""

import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
from safetensors.torch import load_file

from nio_hf.durable.manifest import candidates, newest_usable
from nio_hf.errors import Preempted
from tests.versions import resumes_in_several_processes

COMMAND = [sys.executable, "-m", "nio_hf.cli", "train", "vit-tiny/digits/nio"]
SETTINGS = {
    "max_steps": "12",
    "eval_strategy": "no",
    "logging_steps": "1",
    "disable_tqdm": "true",
    "save_strategy": "steps",
    "save_steps": "6",
    "resume_from_checkpoint": "auto",
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
LAUNCHES = {"alone": [], "launched": ["--config_file", "multi_cpu"]}


def _command(output_dir, how, **changes):
    settings = {**SETTINGS, **changes, "output_dir": str(output_dir)}
    return [*COMMAND, *LAUNCHES[how], *(part for key, value in settings.items() for part in (f"--{key}", value))]


def _run(command):
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)


def _stopped_after_a_step(command, number):
    """Send a signal to a command after its first logged step; return its status and its output."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **streams, env=ENVIRONMENT, start_new_session=True) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "'loss'" in line:
                break
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        rest, _ = process.communicate(timeout=60)
        assert not psutil.wait_procs(children, timeout=10)[1], "processes outlive the command"
        return process.returncode, "".join(lines) + rest


@pytest.mark.slow
@pytest.mark.parametrize("how", ["alone", pytest.param("launched", marks=resumes_in_several_processes)])
def test_sigterm_saves_and_the_same_command_goes_on(how, tmp_path):
    whole = _run(_command(tmp_path / "whole", how))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    command = _command(tmp_path / "stopped", how)
    status, output = _stopped_after_a_step(command, signal.SIGTERM)
    assert status == Preempted.STATUS, output
    assert output.count("SIGTERM: saved and stopped at step") == 1
    assert newest_usable(candidates(tmp_path / "stopped")) is not None
    again = _run(command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "Resuming from" in again.stdout + again.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(bool((one[name] == two[name]).all()) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["alone", "launched"])
def test_an_interrupt_ends_all_processes_and_says_how_to_go_on(how, tmp_path):
    status, output = _stopped_after_a_step(_command(tmp_path, how), signal.SIGINT)
    assert status == 130, output
    assert "--resume_from_checkpoint auto goes on" in output


@pytest.mark.slow
def test_a_training_that_is_finished_says_so(tmp_path):
    command = _command(tmp_path, "alone", max_steps="2", save_steps="2")
    assert _run(command).returncode == 0
    before = load_file(tmp_path / "model.safetensors")
    again = _run(command)
    assert again.returncode == 0
    assert "is the end of that training" in again.stdout + again.stderr
    after = load_file(tmp_path / "model.safetensors")
    assert all(bool((before[name] == after[name]).all()) for name in before)


@pytest.mark.slow
def test_an_initialisation_that_was_stopped_goes_on(tmp_path):
    command = [part if part != "train" else "init" for part in _command(tmp_path, "alone")]
    finished = _run([*command, "--device", "cpu"])
    assert finished.returncode == 0, finished.stderr
    state = json.loads((tmp_path / "_nio_init" / "nio_state.json").read_text())
    again = _run([*command, "--device", "cpu"])
    assert "NIO is finished: taking over" in again.stdout + again.stderr
    assert json.loads((tmp_path / "_nio_init" / "nio_state.json").read_text()) == state
