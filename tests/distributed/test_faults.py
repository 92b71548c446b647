"""Trainings that are killed or asked to stop, and started again with the same command."""

import contextlib
import json
import os
import random
import signal
import time

import psutil
import pytest

from nio_hf.durable.manifest import fault_of, has_manifest
from nio_hf.errors import Preempted
from nio_hf.hub.run_folder import INIT_DIR_NAME
from tests.distributed import launched
from tests.distributed.launched import COMPUTED, PUBLISHED
from tests.distributed.launching import launch, start, trained, training_in
from tests.distributed.ranks import run_ranks
from tests.durable.trainings import ROOT
from tests.versions import resumes_in_several_processes

RESULTS = ROOT / "benchmarks" / "results" / "kills.json"


def _settings(**arguments):
    return {"resume": "auto", "arguments": {"max_steps": 8, "enable_jit_checkpoint": True, **arguments}}


SEARCHING = _settings(**{**PUBLISHED, "nio_iterations": 6}, save_total_limit=2)
COMPUTING = _settings(**COMPUTED)
RACING = _settings(**COMPUTED, nio_race_steps=4)
LOADING = _settings(**{**PUBLISHED, "nio_iterations": 6}, save_total_limit=2, dataloader_num_workers=2)
SINGLE, TWO = ("single", 1), ("ddp", 2)
PACE, SECONDS = 0.25, 5.0
"""Seconds that each of 16 batches takes longer where moments are random, so that all of them take about five."""
REPORTED = 2
"""Batches in front of those that NIO searches on."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(processes, settings) -> digest of the weights of a training that nothing happened to."""
    digests = {}

    def digest(processes, settings):
        key = (processes, json.dumps(settings))
        if key not in digests:
            digests[key] = trained(tmp_path_factory.mktemp("whole"), *processes, **settings)[0]["trained"]
        return digests[key]

    return digest


def _started_again(folder, processes, settings, faults):
    """A training with a fault, and the same command once more."""
    first = launch(folder, *processes, **settings, faults=faults)
    assert first.status != 0
    assert not first.reports
    second = launch(folder, *processes, **settings, faults=faults)
    assert second.status == 0, second.output[-3000:]
    return first, second


def _fault(place, number, name="SIGKILL", **more):
    return {place: {"number": number, "signal": name, **more}}


RESUMED = ["NIO is finished: taking over", "Race, training loss:"]
KILLS = {
    "in NIO": (SINGLE, COMPUTING, _fault("loss", 16), []),
    "after NIO": (SINGLE, SEARCHING, _fault("step", 1), RESUMED[:1]),
    "in a race": (SINGLE, RACING, _fault("step", 3), RESUMED),
    "in a race of two": (TWO, RACING, _fault("step", 3, rank=1), RESUMED),
    "in the save of the initialised checkpoint": (TWO, SEARCHING, {"save": True}, []),
    **{
        f"in a checkpoint under {strategy}": (
            (strategy, 2),
            SEARCHING,
            _fault("checkpoint", 4, rank=1),
            ["checkpoint-4 is passed over"],
        )
        for strategy in ("fsdp2", "zero2", "zero3")
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", KILLS)
def test_a_training_that_was_killed_is_gone_on_with(moment, tmp_path, uninterrupted):
    processes, settings, faults, said = KILLS[moment]
    first, second = _started_again(tmp_path, processes, settings, faults)
    if processes == SINGLE:
        assert first.status == -signal.SIGKILL
    assert [text for text in said if text not in second.output] == []
    assert [report["trained"] for report in second.reports] == [uninterrupted(processes, settings)] * processes[1]
    initialised = tmp_path / "output" / INIT_DIR_NAME
    assert fault_of(initialised) is None
    assert [path.name for path in initialised.parent.glob(f"{INIT_DIR_NAME}*")] == [INIT_DIR_NAME]


@pytest.mark.slow
@resumes_in_several_processes
def test_killed_in_the_save_of_a_checkpoint(tmp_path, uninterrupted):
    _, second = _started_again(tmp_path, TWO, SEARCHING, _fault("checkpoint", 4))
    assert second.output.count("checkpoint-4 is passed over: nio_manifest.json is missing") == 1
    assert "Resuming from" in second.output
    assert [report["trained"] for report in second.reports] == [uninterrupted(TWO, SEARCHING)] * 2
    kept = sorted(path.name for path in (tmp_path / "output").glob("checkpoint-*"))
    assert kept == ["checkpoint-6", "checkpoint-8"]
    assert all(fault_of(tmp_path / "output" / name) is None for name in kept)


IN_NIO = "during NIO, stopped before it was through"
STOPS = {
    "in NIO": (SINGLE, SEARCHING, _fault("nio", REPORTED + 2, "SIGTERM"), IN_NIO),
    "in NIO, one of two": (TWO, COMPUTING, _fault("loss", 3, "SIGTERM", rank=1), IN_NIO),
    "in a race, one of two": (TWO, RACING, _fault("step", 3, "SIGTERM", rank=1), "during the race, stopped after"),
    "in NIO, workers too": (SINGLE, LOADING, _fault("nio", REPORTED + 2, "SIGTERM", group=True), IN_NIO),
    "in a step, workers too": (SINGLE, LOADING, _fault("step", 4, "SIGTERM", group=True), "saved and stopped"),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", STOPS)
def test_sigterm_stops_all_and_the_training_is_gone_on_with(moment, tmp_path, uninterrupted):
    processes, settings, faults, said = STOPS[moment]
    first, second = _started_again(tmp_path, processes, settings, faults)
    assert f"SIGTERM: {said}" in first.output
    if processes == SINGLE:
        assert first.status == Preempted.STATUS
    else:
        assert f"exitcode  : {Preempted.STATUS}" in first.output
    expected = uninterrupted(processes, SEARCHING if settings is LOADING else settings)
    assert [report["trained"] for report in second.reports] == [expected] * processes[1]


@resumes_in_several_processes
def test_sigterm_to_one_process_saves_and_stops_all(tmp_path):
    whole = run_ranks(2, launched.run, training_in(tmp_path / "whole", "ddp", **SEARCHING))
    settings = training_in(tmp_path / "run", "ddp", **SEARCHING, faults=_fault("step", 4, "SIGTERM", rank=1))
    for ended in run_ranks(2, launched.run, settings):
        assert "Preempted: SIGTERM: saved and stopped at step 5" in str(ended)
    assert fault_of(tmp_path / "run" / "output" / "checkpoint-5") is None
    again = run_ranks(2, launched.run, settings)
    assert [report["step"] for report in again] == [8, 8]
    assert [report["trained"] for report in again] == [report["trained"] for report in whole]


@pytest.mark.slow
def test_a_second_training_into_the_same_folder_is_refused(tmp_path):
    process = start(tmp_path, *SINGLE, **SEARCHING, pace=1.0)
    try:
        _read_until(process, "ready")
        time.sleep(2)
        second = launch(tmp_path, *SINGLE, **SEARCHING)
    finally:
        _kill(process)
    assert second.status == 1
    assert "output: another training writes here. Wait for it to end" in second.output


def test_a_rank_that_fails_stops_the_launch_within_seconds(tmp_path):
    process = start(tmp_path, *TWO, **SEARCHING, faults={"nan": [1, REPORTED + 1]})
    try:
        output = _read_until(process, "ready")
        began = time.monotonic()
        rest, _ = process.communicate(timeout=30)
    finally:
        _kill(process)
    assert time.monotonic() - began < 30
    assert process.returncode != 0
    found = "NumericsError: rank 1, iteration 2, sub-batch 1: the loss is nan"
    assert len([line for line in (output + rest).splitlines() if line.startswith(found)]) == 1


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path_factory, uninterrupted):
    """Trainings of one process and of two, of a ViT, a Swin and a ViT whose head was replaced.

    Each is killed once between its start and its usual end.
    """
    moments = random.Random(20)
    models = [{"model": "vit"}, {"model": "swin"}, {"model": "vit", "replaced_head": True}]
    runs = []
    for number in range(20):
        processes, model = (SINGLE, TWO)[number % 2], models[number // 2 % 3]
        folder = tmp_path_factory.mktemp(f"random{number}")
        settings = {**SEARCHING, **model}
        expected = uninterrupted(processes, settings)
        fraction = moments.random()
        left = _killed_after(fraction * SECONDS, folder, processes, settings)
        run = {**model, "processes": processes[1], "fraction": round(fraction, 3), **left}
        reports = trained(folder, *processes, **settings)
        run["same_weights"] = all(report["trained"] == expected for report in reports)
        runs.append(run)
    if "NIO_HF_WRITE_RESULTS" in os.environ:
        RESULTS.write_text(json.dumps({"seed": 20, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    assert all(run["same_weights"] for run in runs)
    assert len({run["found"] for run in runs}) > 2


def _killed_after(seconds, folder, processes, settings):
    """Kill a training, launcher and all, some time after it is set up; says what it left behind."""
    process = start(folder, *processes, **settings, pace=PACE)
    for _ in range(processes[1]):
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
    else:
        found = "initialised" if (output / INIT_DIR_NAME).is_dir() else "nothing"
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
