"""The process of a trial."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nio_hf import NIOTrainingArguments
from nio_hf.metrics import ACCURACY, IMAGE_CLASSIFICATION, LOSS, METRICS
from nio_hf.trials.costs import most_steps
from nio_hf.trials.results import Outcome
from nio_hf.trials.worker import train_once

PROGRAM = """
import multiprocessing, os, pathlib, sys, time
from nio_hf.trials.worker import end_with_parent

def work(file):
    end_with_parent()
    pathlib.Path(file).write_text(str(os.getpid()))
    time.sleep(120)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[2])
    context.Process(target=work, args=(sys.argv[1],), daemon=True).start()
    time.sleep(120)
"""


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or ") Z " not in status.read_text()


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_trial_ends_with_the_process_that_started_it(method: str, tmp_path: Path) -> None:
    program, file = tmp_path / "program.py", tmp_path / "pid"
    program.write_text(PROGRAM, encoding="utf-8")
    with subprocess.Popen([sys.executable, str(program), str(file), method]) as process:
        deadline = time.monotonic() + 120
        while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        pid = int(file.read_text())
        assert _runs(pid)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    deadline = time.monotonic() + 20
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(pid)


@pytest.mark.parametrize(
    ("method", "pays"),
    [("none", False), ("range", False), ("xavier", False), ("architecture_aware", True), ("nio", True)],
)
def test_a_method_that_looks_at_no_data_is_not_paid_for(method: str, pays: bool, tmp_path: Path) -> None:
    outcome = _trained(tmp_path, nio_method=method, max_steps=14)
    assert (outcome.cost_steps > 0) == pays
    assert outcome.steps == 14 - math.ceil(outcome.cost_steps)


def _trained(folder: Path, **settings: Any) -> Outcome:
    settings |= {"output_dir": folder, "use_cpu": True, "report_to": "none"}
    options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    return train_once("vit-tiny/digits/nio", options, diagnostics=False)


def test_the_steps_of_a_race_are_paid_for(tmp_path: Path) -> None:
    outcome = _trained(
        tmp_path, nio_method="range", nio_method_kwargs='{"factor": 2.0}', max_steps=20, nio_race_steps=4
    )
    assert outcome.cost_steps in (6, 8)
    assert outcome.steps == 20 - outcome.cost_steps
    args = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "nio_race_steps": 4}
    most = {method: most_steps(NIOTrainingArguments(**args, nio_method=method)) for method in ("range", "nio")}
    assert most["range"] == 12
    assert most["nio"] == 12 + most_steps(NIOTrainingArguments(**{**args, "nio_race_steps": 0}))


def test_the_value_of_a_trial_is_that_of_its_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_metric = {}
    for metric in (ACCURACY, LOSS):
        monkeypatch.setitem(METRICS, IMAGE_CLASSIFICATION, metric)
        by_metric[metric] = _trained(tmp_path, nio=False, max_steps=2, max_eval_samples=50)
    assert by_metric[LOSS].value == by_metric[LOSS].eval_loss == by_metric[ACCURACY].eval_loss
    percent = by_metric[ACCURACY].value
    assert percent is not None
    assert 2 <= percent <= 100
    assert percent / 2 == pytest.approx(round(percent / 2)), "a share of 50 images, in percent"
