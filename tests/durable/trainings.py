"""Small trainings with disturbances."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from nio_hf import NIOTrainer
from tests.trainer.toys import ToyImages, arguments, build, snapshot

Weights = dict[str, torch.Tensor]
PUBLISHED: dict[str, Any] = {"nio_search": "published", "nio_groups": "tensor", "nio_iterations": 5, "nio_lr": 0.05}
"""A run of NIO in five iterations."""


class Counting(NIOTrainer):
    """Counts the losses of NIO, and evaluates to the distance from a step."""

    losses = 0
    best_step = 1

    def compute_nio_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.losses += 1
        return super().compute_nio_loss(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {**super().evaluate(*args, **kwargs), "eval_step": float(abs(self.state.global_step - self.best_step))}


class At(TrainerCallback):
    """Carries out an action once at an event, the first time or after a number of steps."""

    def __init__(self, event: str, action: Callable[[], Any], steps: int | None = None) -> None:
        self.action, self.steps, self.is_done = action, steps, False
        setattr(self, event, self._act)

    def _act(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.is_done and self.steps in (None, state.global_step):
            self.is_done = True
            self.action()


class Notes(TrainerCallback):
    """Writes into each checkpoint, as a callback of averaged weights does, and remembers steps."""

    def __init__(self) -> None:
        self.evaluated: list[int] = []
        self.saved: list[int] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated.append(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved.append(state.global_step)
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "average" / "notes.txt"
        file.parent.mkdir()
        file.write_text("of a callback")


def terminate() -> None:
    """Send SIGTERM to this process and let its handler be done."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)


def make(
    output_dir: Path,
    trainer_class: Callable[..., Any] = Counting,
    callbacks: Sequence[TrainerCallback] = (),
    samples: int = 64,
    dropout: float = 0.0,
    **changes: Any,
) -> Any:
    return trainer_class(
        model=build("vit", num_hidden_layers=1, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout),
        args=arguments(output_dir, **changes),
        train_dataset=ToyImages(samples),
        eval_dataset=ToyImages(8),
        callbacks=[*callbacks],
    )


def saved_weights(checkpoint: Path) -> Weights:
    return snapshot(type(build("vit")).from_pretrained(checkpoint, dtype=torch.float32))


def steps_saved(output_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in output_dir.glob("checkpoint-*"))
