"""Small trainings with disturbances."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from nio_hf import NIOTrainer
from tests.trainer.toys import ToyImages, build, snapshot, trainer_of

ROOT = Path(__file__).parents[2]
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
SAVING = {"nio": False, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "step", "greater_is_better": False}
"""With a `Counting` trainer, whose best step is chosen."""


class Counting(NIOTrainer):
    """Counts the losses of NIO, and evaluates to the distance from a step."""

    losses = 0
    best_step = 1

    def compute_nio_loss(self, *args, **kwargs):
        self.losses += 1
        return super().compute_nio_loss(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        return {**super().evaluate(*args, **kwargs), "eval_step": float(abs(self.state.global_step - self.best_step))}


class Notes(TrainerCallback):
    """Writes into each checkpoint, as a callback of averaged weights does, and remembers steps."""

    def __init__(self):
        self.evaluated = []
        self.saved = []

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated.append(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self.saved.append(state.global_step)
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "average" / "notes.txt"
        file.parent.mkdir()
        file.write_text("of a callback")


def terminate():
    """Send SIGTERM to this process and let its handler be done."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)


def failing(error):
    """A function that raises the error, whatever it is given."""

    def fail(*args, **kwargs):
        raise error

    return fail


def start_python(*arguments, **options):
    """A process in a session of its own that finds the tests, with all that it prints in `stdout`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes, **options)


def make(output_dir, trainer_class=Counting, dropout=0.0, **given):
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    data = {"model": build("vit", num_hidden_layers=1, **dropouts), "eval_dataset": ToyImages(8)}
    return trainer_of(output_dir, trainer_class, **{**data, **given})


def trained(output_dir, trainer_class=Counting, resume=None, **given):
    trainer = make(output_dir, trainer_class, **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def saved_weights(checkpoint):
    return snapshot(type(build("vit")).from_pretrained(checkpoint, dtype=torch.float32))


def steps_saved(output_dir):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in output_dir.glob("checkpoint-*"))
