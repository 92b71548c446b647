"""Trainings that are killed or asked to stop, and started again with the same command."""

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from nio_hf.durable.manifest import fault_of, has_manifest
from nio_hf.errors import Preempted
from nio_hf.hub.run_folder import INIT_DIR_NAME
from tests.distributed import launched
from tests.distributed.launched import COMPUTED, PUBLISHED
from tests.distributed.launching import launch, start, training_in
from tests.distributed.ranks import run_ranks
from tests.versions import resumes_in_several_processes

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "kills.json"
SETTINGS = {
    "resume": "auto",
    "arguments": {
        "max_steps": 8,
        "save_total_limit": 2,
        **PUBLISHED,
        "nio_iterations": 6,
        "enable_jit_checkpoint": True,
    },
}
PACE, SECONDS = 0.25, 5.0
"""Seconds that each of 16 batches takes longer where moments are random, so that all of them take about five."""
REPORTED = 2
"""Batches in front of those that NIO searches on."""
COMPUTING = {**SETTINGS, "arguments": {"max_steps": 8, **COMPUTED, "enable_jit_checkpoint": True}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(strategy, processes, settings) -> digest of the weights of a training that nothing happened to."""
    digests = {}

    def digest(strategy, processes, settings=SETTINGS):
        key = (strategy, processes, json.dumps(settings))
        if key not in digests:
            outcome = launch(tmp_path_factory.mktemp("whole"), strategy, processes, **settings)
            assert outcome.status == 0, outcome.output[-3000:]
            digests[key] = outcome.reports[0]["trained"]
        return digests[key]

    return digest


def _started_again(folder, strategy, processes, faults, settings=SETTINGS):
    """A training with a fault, and the same command once more."""
    first = launch(folder, strategy, processes, **settings, faults=faults)
    assert first.status != 0
    assert not first.reports
    second = launch(folder, strategy, processes, **settings, faults=faults)
    assert second.status == 0, second.output[-3000:]
    return first, second


@pytest.mark.slow
def test_killed_in_nio(tmp_path, uninterrupted):
    faults = {"loss": {"number": 16, "signal": "SIGKILL"}}
    first, second = _started_again(tmp_path, "single", 1, faults, COMPUTING)
    assert first.status == -signal.SIGKILL
    assert second.reports[0]["trained"] == uninterrupted("single", 1, COMPUTING)


@pytest.mark.slow
def test_sigterm_to_one_process_in_nio_stops_all(tmp_path, uninterrupted):
    faults = {"loss": {"number": 3, "signal": "SIGTERM", "rank": 1}}
    first, second = _started_again(tmp_path, "ddp", 2, faults, COMPUTING)
    assert "SIGTERM: during NIO, stopped before it was through" in first.output
    assert f"exitcode  : {Preempted.STATUS}" in first.output
    assert [report["trained"] for report in second.reports] == [uninterrupted("ddp", 2, COMPUTING)] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "processes"), [("single", 1), ("ddp", 2)])
def test_killed_in_a_race(strategy, processes, tmp_path, uninterrupted):
    settings = {**COMPUTING, "arguments": {**COMPUTING["arguments"], "nio_race_steps": 4}}
    faults = {"step": {"number": 3, "signal": "SIGKILL", "rank": processes - 1}}
    _, second = _started_again(tmp_path, strategy, processes, faults, settings)
    assert "NIO is finished: taking over" in second.output
    assert "Race, training loss:" in second.output
    expected = uninterrupted(strategy, processes, settings)
    assert {report["trained"] for report in second.reports} == {expected}


@pytest.mark.slow
def test_sigterm_to_one_process_in_a_race_stops_all(tmp_path, uninterrupted):
    settings = {**COMPUTING, "arguments": {**COMPUTING["arguments"], "nio_race_steps": 4}}
    faults = {"step": {"number": 3, "signal": "SIGTERM", "rank": 1}}
    first, second = _started_again(tmp_path, "ddp", 2, faults, settings)
    assert "SIGTERM: during the race, stopped after" in first.output
    assert f"exitcode  : {Preempted.STATUS}" in first.output
    assert {report["trained"] for report in second.reports} == {uninterrupted("ddp", 2, settings)}


@pytest.mark.slow
def test_killed_in_the_save_of_the_initialised_checkpoint(tmp_path, uninterrupted):
    _, second = _started_again(tmp_path, "ddp", 2, {"save": True})
    assert [report["trained"] for report in second.reports] == [uninterrupted("ddp", 2)] * 2
    initialised = tmp_path / "output" / INIT_DIR_NAME
    assert fault_of(initialised) is None
    assert [path.name for path in initialised.parent.glob(f"{INIT_DIR_NAME}*")] == [INIT_DIR_NAME]


@pytest.mark.slow
@resumes_in_several_processes
def test_killed_in_the_save_of_a_checkpoint(tmp_path, uninterrupted):
    faults = {"checkpoint": {"number": 4, "signal": "SIGKILL"}}
    _, second = _started_again(tmp_path, "ddp", 2, faults)
    assert second.output.count("checkpoint-4 is passed over: nio_manifest.json is missing") == 1
    assert "Resuming from" in second.output
    assert [report["trained"] for report in second.reports] == [uninterrupted("ddp", 2)] * 2
    kept = sorted(path.name for path in (tmp_path / "output").glob("checkpoint-*"))
    assert kept == ["checkpoint-6", "checkpoint-8"]
    assert all(fault_of(tmp_path / "output" / name) is None for name in kept)


@pytest.mark.slow
def test_killed_after_nio_it_is_not_run_again(tmp_path, uninterrupted):
    _, second = _started_again(tmp_path, "single", 1, {"step": {"number": 1, "signal": "SIGKILL"}})
    assert "NIO is finished: taking over" in second.output
    assert second.reports[0]["trained"] == uninterrupted("single", 1)


@resumes_in_several_processes
def test_sigterm_to_one_process_saves_and_stops_all(tmp_path):
    whole = run_ranks(2, launched.run, training_in(tmp_path / "whole", "ddp", **SETTINGS))
    faults = {"step": {"number": 4, "signal": "SIGTERM", "rank": 1}}
    settings = training_in(tmp_path / "run", "ddp", **SETTINGS, faults=faults)
    for ended in run_ranks(2, launched.run, settings):
        assert "Preempted: SIGTERM: saved and stopped at step 5" in str(ended)
    assert fault_of(tmp_path / "run" / "output" / "checkpoint-5") is None
    again = run_ranks(2, launched.run, settings)
    assert [report["step"] for report in again] == [8, 8]
    assert [report["trained"] for report in again] == [report["trained"] for report in whole]


@pytest.mark.slow
@resumes_in_several_processes
def test_sigterm_to_one_process_of_a_launch_saves_and_stops_all(tmp_path, uninterrupted):
    first, second = _started_again(tmp_path, "ddp", 2, {"step": {"number": 4, "signal": "SIGTERM"}})
    assert "SIGTERM: saved and stopped at step 5" in first.output
    assert f"exitcode  : {Preempted.STATUS}" in first.output
    assert "checkpoint-5" in second.output
    assert [report["trained"] for report in second.reports] == [uninterrupted("ddp", 2)] * 2


@pytest.mark.slow
def test_sigterm_in_nio_exits_with_its_status(tmp_path, uninterrupted):
    faults = {"nio": {"number": REPORTED + 2, "signal": "SIGTERM"}}
    first, second = _started_again(tmp_path, "single", 1, faults)
    assert first.status == Preempted.STATUS
    assert "SIGTERM: during NIO, stopped before it was through" in first.output
    assert second.reports[0]["trained"] == uninterrupted("single", 1)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["nio", "step"])
def test_sigterm_to_every_process_of_a_job_spares_the_workers_that_load_data(phase, tmp_path, uninterrupted):
    arguments = {**SETTINGS["arguments"], "dataloader_num_workers": 2}
    faults = {phase: {"number": REPORTED + 2, "signal": "SIGTERM", "group": True}}
    settings = {**SETTINGS, "arguments": arguments, "faults": faults}
    first = launch(tmp_path, "single", 1, **settings)
    assert first.status == Preempted.STATUS, first.output[-3000:]
    second = launch(tmp_path, "single", 1, **settings)
    assert second.reports[0]["trained"] == uninterrupted("single", 1)


@pytest.mark.slow
def test_a_second_training_into_the_same_folder_is_refused(tmp_path):
    process = start(tmp_path, "single", 1, **SETTINGS, pace=1.0)
    try:
        _read_until(process, "ready")
        time.sleep(2)
        second = launch(tmp_path, "single", 1, **SETTINGS)
    finally:
        _kill(process)
    assert second.status == 1
    assert "output: another training writes here. Wait for it to end" in second.output


def test_a_rank_that_fails_stops_the_launch_within_seconds(tmp_path):
    process = start(tmp_path, "ddp", 2, **SETTINGS, faults={"nan": [1, REPORTED + 1]})
    try:
        output = _read_until(process, "ready")
        began = time.monotonic()
        rest, _ = process.communicate(timeout=30)
    finally:
        _kill(process)
    assert time.monotonic() - began < 30
    assert process.returncode != 0
    found = "NumericsError: rank 1, iteration 2, sub-batch 1: the loss is nan"
    errors = [line for line in (output + rest).splitlines() if line.startswith(found)]
    assert len(errors) == 1


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
def test_killed_in_a_checkpoint_under_each_strategy(strategy, tmp_path, uninterrupted):
    faults = {"checkpoint": {"number": 4, "signal": "SIGKILL", "rank": 1}}
    _, second = _started_again(tmp_path, strategy, 2, faults)
    assert "checkpoint-4 is passed over" in second.output
    assert {report["trained"] for report in second.reports} == {uninterrupted(strategy, 2)}


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path_factory, uninterrupted):
    """Trainings of one process and of two, of a ViT, a Swin and a ViT whose head was replaced.

    Each is killed once between its start and its usual end.
    """
    moments = random.Random(20)
    launches = [("single", 1), ("ddp", 2)]
    models = [{"model": "vit"}, {"model": "swin"}, {"model": "vit", "replaced_head": True}]
    runs = []
    for number in range(20):
        strategy, processes = launches[number % 2]
        folder = tmp_path_factory.mktemp(f"random{number}")
        settings = {**SETTINGS, **models[number // 2 % 3]}
        expected = uninterrupted(strategy, processes, settings)
        fraction = moments.random()
        left = _killed_after(fraction * SECONDS, folder, strategy, processes, settings)
        run = {**models[number // 2 % 3], "processes": processes, "fraction": round(fraction, 3), **left}
        second = launch(folder, strategy, processes, **settings)
        assert second.status == 0, second.output[-3000:]
        run["same_weights"] = all(report["trained"] == expected for report in second.reports)
        runs.append(run)
    if "NIO_HF_WRITE_RESULTS" in os.environ:
        RESULTS.write_text(json.dumps({"seed": 20, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    assert all(run["same_weights"] for run in runs)
    assert len({run["found"] for run in runs}) > 2


def _killed_after(seconds, folder, strategy, processes, settings):
    """Kill a training, launcher and all, some time after it is set up; says what it left behind."""
    process = start(folder, strategy, processes, **settings, pace=PACE)
    for _ in range(processes):
        _read_until(process, "ready")
    time.sleep(seconds)
    running = process.poll() is None
    _kill(process)
    output = folder / "output"
    checkpoints = sorted(output.glob("checkpoint-*"))
    partial = [path.name for path in checkpoints if not has_manifest(path)]
    if (output / "report-0.json").exists() or not running:
        found = "finished"
    elif checkpoints:
        found = "training"
    elif (output / INIT_DIR_NAME).is_dir():
        found = "initialised"
    else:
        found = "nothing"
    return {"found": found, "checkpoints": [path.name for path in checkpoints], "half_written": partial}


def _read_until(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            break
    return "".join(lines)


def _kill(process):
    """Kill a launch with all that it has started; the processes of a launcher have sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
