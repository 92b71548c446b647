"""An exponential moving average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from nio_hf.errors import CheckpointError, Problem
from nio_hf.training.saving import output_errors

EMA_NAME = "ema.safetensors"


class EMACallback(TrainerCallback):
    """Averages the parameters after each optimiser step: a <- decay a + (1 - decay) theta; buffers are the model's.

    The average starts at the weights of the first step, is saved with each checkpoint and restored on resume.

    Args:
        current_model: gives the model that is trained, unwrapped.
        decay: in (0, 1).
    """

    def __init__(self, current_model: Callable[[], nn.Module], decay: float) -> None:
        self._current_model = current_model
        self._decay = decay
        self._checkpoint: Path | None = None
        self._average: AveragedModel | None = None

    def resume_from(self, checkpoint: Path) -> None:
        """Restore the average from a checkpoint when training begins."""
        self._checkpoint = checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from the model's weights, or from the average of the checkpoint that training resumes from.

        Raises:
            CheckpointError: for a checkpoint without an average.
        """
        model = self._current_model()
        self._average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self._decay))
        self._average.requires_grad_(False)
        self._average.n_averaged += 1  # the first update averages instead of copying
        if self._checkpoint is not None and state.global_step > 0:
            file = self._checkpoint / EMA_NAME
            if not file.is_file():
                found = "no average of the weights: it was saved by a training without ema_decay"
                raise CheckpointError(Problem(str(file), found, "Resume without ema_decay, or start anew"))
            safetensors.torch.load_model(self._average.module, file)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update the average."""
        if self._average is not None:
            self._average.update_parameters(self._current_model())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save the average into the checkpoint of this step."""
        if self._average is not None and args.should_save and args.output_dir is not None:
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            with output_errors(checkpoint / EMA_NAME):
                safetensors.torch.save_model(self._average.module, str(checkpoint / EMA_NAME))

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model with its averaged weights, as long as the context lasts."""
        if self._average is None:
            yield
            return
        model, average = self._current_model(), self._average.module
        self._swap(model, average)
        try:
            yield
        finally:
            self._swap(model, average)

    @staticmethod
    def _swap(left: nn.Module, right: nn.Module) -> None:
        with torch.no_grad():
            others = right.state_dict()
            for name, tensor in left.state_dict().items():
                held = tensor.clone()
                tensor.copy_(others[name])
                others[name].copy_(held)
