"""The process of a trial."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
    ("method", "pays"), [("none", False), ("range", False), ("xavier", False), ("architecture_aware", True)]
)
def test_a_method_that_looks_at_no_data_is_not_paid_for(method: str, pays: bool, tmp_path: Path) -> None:
    settings = {"nio_method": method, "output_dir": tmp_path, "max_steps": 14, "use_cpu": True, "report_to": "none"}
    options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    outcome = train_once("vit-tiny/digits/nio", options, diagnostics=False)
    assert (outcome.cost_steps > 0) == pays
    assert outcome.steps == 14 - math.ceil(outcome.cost_steps)
