"""Small trainings with disturbances."""

import os
import signal
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from nio_hf import NIOTrainer
from tests.trainer.toys import ToyImages, arguments, build, snapshot

Weights = dict[str, torch.Tensor]
PUBLISHED = {"nio_search": "published", "nio_groups": "tensor", "nio_iterations": 5, "nio_lr": 0.05}
"""A run of NIO in five iterations."""


class Counting(NIOTrainer):
    """Counts the losses of NIO, and evaluates to the distance from a step."""

    losses = 0
    best_step = 1

    def compute_nio_loss(self, *args, **kwargs):
        self.losses += 1
        return super().compute_nio_loss(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        return {**super().evaluate(*args, **kwargs), "eval_step": float(abs(self.state.global_step - self.best_step))}


class At(TrainerCallback):
    """Carries out an action once at an event, the first time or after a number of steps."""

    def __init__(self, event, action, steps=None):
        self.action, self.steps, self.is_done = action, steps, False
        setattr(self, event, self._act)

    def _act(self, args, state, control, **kwargs):
        if not self.is_done and self.steps in (None, state.global_step):
            self.is_done = True
            self.action()


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


def make(output_dir, trainer_class=Counting, callbacks=(), samples=64, dropout=0.0, **changes):
    return trainer_class(
        model=build("vit", num_hidden_layers=1, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout),
        args=arguments(output_dir, **changes),
        train_dataset=ToyImages(samples),
        eval_dataset=ToyImages(8),
        callbacks=[*callbacks],
    )


def saved_weights(checkpoint):
    return snapshot(type(build("vit")).from_pretrained(checkpoint, dtype=torch.float32))


def steps_saved(output_dir):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in output_dir.glob("checkpoint-*"))
