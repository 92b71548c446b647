"""Exponential moving average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from nio_hf.errors import CheckpointError, Problem
from nio_hf.files import output_errors
from nio_hf.trainer import NIOTrainer

EMA_NAME = "ema.safetensors"
_Tensors = dict[str, torch.Tensor]


class EMACallback(TrainerCallback):
    """Average of the parameters, updated after each optimiser step: a <- decay a + (1 - decay) theta.

    It starts at the initial weights, is saved with each checkpoint and restored on resume. Buffers are not averaged.
    Tensors may be tied in any way: one Parameter in several modules, or memory that parameters and buffers share.

    Args:
        trainer: Trainer whose model is averaged.
        decay: Decay, in (0, 1).
    """

    def __init__(self, trainer: NIOTrainer, decay: float) -> None:
        self._trainer = trainer
        self._update = get_ema_multi_avg_fn(decay)
        self._average: _Tensors | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start from the weights of the model, or from the average of the checkpoint that training resumes from.

        Raises:
            CheckpointError: Checkpoint without an average of each parameter.
        """
        self._average = _copy(self._parameters())
        if self._trainer.resumed_from is None:
            return
        file, fix = self._trainer.resumed_from / EMA_NAME, "Resume without ema_decay, or start anew"
        if not file.is_file():
            found = "no average of the weights: the training that saved it had no ema_decay"
            raise CheckpointError(Problem(str(file), found, fix))
        saved = safetensors.torch.load_file(file)
        missing = [name for name, mean in self._average.items() if name not in saved or saved[name].shape != mean.shape]
        if missing:
            raise CheckpointError(Problem(str(file), f"no average that fits {', '.join(missing)}", fix))
        _write(saved, self._average)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        """Update the average."""
        if self._average is not None:
            self._update(list(self._average.values()), list(self._parameters().values()), state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        """Save the average into the checkpoint of this step."""
        if self._average is not None and args.should_save and args.output_dir is not None:
            file = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / EMA_NAME
            with output_errors(file):
                safetensors.torch.save_file({name: mean.contiguous() for name, mean in self._average.items()}, file)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the model its averaged weights, as long as the context lasts."""
        if self._average is None:
            yield
            return
        parameters = self._parameters()
        # All are copied before one is written, as parameters may share memory.
        trained = _copy(parameters)
        _write(self._average, parameters)
        try:
            yield
        finally:
            _write(trained, parameters)

    def _parameters(self) -> _Tensors:
        """Parameters that training can change, each once. Integers have no gradient."""
        parameters = self._trainer.unwrapped_model.named_parameters()
        return {name: p.detach() for name, p in parameters if p.is_floating_point() or p.is_complex()}


def _copy(tensors: _Tensors) -> _Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _write(values: _Tensors, targets: _Tensors) -> None:
    for name, target in targets.items():
        target.copy_(values[name])
