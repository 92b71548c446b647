"""The report of NIO to the log history and, through the log of Trainer, to trackers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nio_hf.core.config import is_number
from nio_hf.core.result import InitResult, IterationRecord

if TYPE_CHECKING:
    from transformers import Trainer


class NIOReportCallback(TrainerCallback):
    """Reports a finished NIO run when training begins, since trackers open their run only then.

    It must be the last callback, which [`NIOTrainerMixin`] sees to.

    Args:
        trainer: Trainer whose log gets the report.

    Attributes:
        seeded: Optimizer whose second moment the training that is under way has seeded; None where there is none.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._pending: InitResult | None = None
        self._model: nn.Module | None = None
        self.seeded: torch.optim.Optimizer | None = None

    def report_later(self, result: InitResult, model: nn.Module) -> None:
        """Keep the result of a model until its next training ends."""
        self._pending, self._model = result, model

    def is_of(self, model: nn.Module) -> bool:
        """Whether what is pending is of this model."""
        return self._model is model

    def forget(self) -> None:
        """Keep nothing: what is pending belongs to a training that did not come to its end."""
        self._pending = self._model = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report what is pending."""
        result = self._pending
        if result is None:
            return
        state.log_history += [_history_entry(record) for record in result.history]
        self._trainer.log(summary(result))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what was reported; a training that begins again after an out-of-memory reports and seeds again."""
        self.forget()
        self.seeded = None


def summary(result: InitResult) -> dict[str, float]:
    """The measurements of a run as flat log values."""
    return {
        "nio_grad_cosine_before": result.before.value,
        "nio_grad_cosine_after": result.after.value,
        "nio_grad_norm_before": result.before.grad_norm,
        "nio_grad_norm_after": result.after.grad_norm,
        "nio_loss_before": result.before.loss,
        "nio_loss_after": result.after.loss,
        "nio_sub_batches": result.before.sub_batches,
        "nio_batch_size": result.before.batch_size,
        "nio_cost": result.cost,
        "nio_seconds": result.seconds,
        **({} if result.race is None else {"nio_race_cost": result.race.cost}),
    }


def _history_entry(record: IterationRecord) -> dict[str, Any]:
    """An iteration as an entry of the log history; what is not known or not finite is left out."""
    fields = {f"nio_{name}": value for name, value in dataclasses.asdict(record).items()}
    known = {name: value for name, value in fields.items() if isinstance(value, str) or is_number(value)}
    return {**known, "epoch": 0.0, "step": 0}
