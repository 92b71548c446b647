"""The batches of NIO: their labels checked before they are computed on, and the first one known again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from nio_hf.errors import DataError, Problem
from nio_hf.trainer.digests import batch_digest

if TYPE_CHECKING:
    from nio_hf.trainer.trainer import NIOTrainerMixin


class CheckedBatches:
    """Prepared batches whose labels are checked; a re-iterable.

    Attributes:
        digest: Digest of the first batch, before it was prepared; None until it was drawn.
    """

    def __init__(self, batches: DataLoader[Any], classes: int | None, prepare: Callable[[Any, int], Any]) -> None:
        self._batches = batches
        self._classes = classes
        self._prepare = prepare
        self.digest: str | None = None

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self._batches):
            if self.digest is None:
                self.digest = batch_digest(batch)
            if self._classes is not None:
                _check_labels(batch, self._classes, number)
            yield self._prepare(batch, number)


def classes_of_labels(trainer: NIOTrainerMixin) -> int | None:
    """Number of classes that the labels of a Trainer's data can have, where that is known."""
    model: Any = trainer.unwrapped_model
    has_own_loss = trainer.compute_loss_func is not None or type(trainer).compute_loss is not Trainer.compute_loss
    classifies = type(model).__name__.endswith(("ForImageClassification", "ForSequenceClassification"))
    if has_own_loss or not classifies or not type(model).__module__.startswith("transformers."):
        return None
    num_labels: int = model.config.num_labels
    return num_labels if num_labels > 1 else None


def _check_labels(batch: Any, classes: int, number: int) -> None:
    labels = batch.get("labels") if hasattr(batch, "get") else None
    if not isinstance(labels, torch.Tensor) or labels.ndim != 1 or labels.is_floating_point():
        return
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != -100)]
    if len(wrong):
        found = f"label {int(wrong[0])} for a model of {classes} classes"
        fix = "Set num_labels in the model config to the number of classes, counted from 0"
        raise DataError(Problem(f"labels of NIO batch {number}", found, fix))
