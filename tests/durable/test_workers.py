"""Signals and errors while the workers of a data loader are at work, in processes of their own."""

import contextlib
import os
import signal
import time

import pytest

from nio_hf.durable.manifest import candidates, checkpoint_fault
from nio_hf.errors import Preempted
from tests.durable.trainings import start_python

pytestmark = pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs groups of processes")
LIMIT = 120
"""Seconds after which a process counts as hanging."""
TRAINING = """
import sys, time
from pathlib import Path
import torch
from transformers import Trainer, TrainerCallback
from nio_hf import NIOTrainer
from nio_hf.durable import DurableTrainerMixin
from tests.trainer.toys import ToyImages, trained

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
    trainer_class = NIOTrainer if kind == "broken" else Durable
    given = {"train_dataset": Slow(64), "callbacks": [Told()], "nio": kind == "broken", "max_steps": 200}
    trained(folder, trainer_class, dataloader_num_workers=2, enable_jit_checkpoint=True, **given)
"""


@contextlib.contextmanager
def training(tmp_path, kind):
    """A process that trains into `run`, of which nothing is left in the end."""
    (tmp_path / "run").mkdir()
    (tmp_path / "script.py").write_text(TRAINING)
    process = start_python(tmp_path / "script.py", tmp_path / "run", kind)
    try:
        yield process
        time.sleep(0.2)
        assert not alive(process.pid), "workers end with their parent"
    finally:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("to", ["process", pytest.param("group", marks=pytest.mark.slow)])
def test_sigterm_while_workers_load_saves_the_step(to, tmp_path):
    with training(tmp_path, "slow") as process:
        until = time.monotonic() + LIMIT
        while not (tmp_path / "run" / "step-2").exists() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        (os.killpg if to == "group" else os.kill)(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=LIMIT)
        assert process.returncode == Preempted.STATUS, output
        assert "killed by signal" not in output
        (checkpoint,) = candidates(tmp_path / "run")
        assert checkpoint_fault(checkpoint) is None


@pytest.mark.slow
def test_an_error_in_a_worker_ends_the_process(tmp_path):
    with training(tmp_path, "broken") as process:
        output, _ = process.communicate(timeout=LIMIT)
        assert process.returncode == 1
        assert "a broken image" in output
