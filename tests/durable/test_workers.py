"""Signals and errors while the workers of a data loader are at work, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nio_hf.durable.manifest import candidates, checkpoint_fault
from nio_hf.errors import Preempted

ROOT = Path(__file__).parents[2]
LIMIT = 120
"""Seconds after which a process counts as hanging."""
TRAINING = """
import sys, time
from pathlib import Path
import torch
from transformers import Trainer, TrainerCallback
from nio_hf import NIOTrainer
from nio_hf.durable import DurableTrainerMixin
from tests.trainer.toys import ToyImages, arguments, build

folder, kind = Path(sys.argv[1]), sys.argv[2]

class Slow(ToyImages):
    def __getitem__(self, index):
        time.sleep(0.05)
        if kind == "broken":
            raise OSError("a broken image")
        return super().__getitem__(index)

class Told(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        (folder / f"step-{state.global_step}").touch()

class Durable(DurableTrainerMixin, Trainer):
    pass

if __name__ == "__main__":
    args = arguments(folder, nio=kind == "broken", max_steps=200, dataloader_num_workers=2, enable_jit_checkpoint=True)
    trainer = (NIOTrainer if kind == "broken" else Durable)(
        model=build("vit"), args=args, train_dataset=Slow(64), callbacks=[Told()]
    )
    trainer.train()
"""


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(TRAINING)
    return file


def start(script, folder, kind):
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(folder), kind]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs groups of processes")
@pytest.mark.parametrize("to", ["process", "group"])
def test_sigterm_while_workers_load_saves_the_step(to, script, tmp_path):
    folder = tmp_path / "run"
    process = start(script, folder, "slow")
    try:
        until = time.monotonic() + LIMIT
        while not (folder / "step-2").exists() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        (os.killpg if to == "group" else os.kill)(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=LIMIT)
        assert process.returncode == Preempted.STATUS, output
        assert "killed by signal" not in output
        (checkpoint,) = candidates(folder)
        assert checkpoint_fault(checkpoint) is None
        time.sleep(0.2)
        assert not alive(process.pid), "workers end with their parent"
    finally:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs groups of processes")
def test_an_error_in_a_worker_ends_the_process(script, tmp_path):
    process = start(script, tmp_path / "run", "broken")
    try:
        output, _ = process.communicate(timeout=LIMIT)
        assert process.returncode == 1
        assert "a broken image" in output
        time.sleep(0.2)
        assert not alive(process.pid), "workers end with their parent"
    finally:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
