"""`NIOTrainer`: the Trainer, from an initialisation that NIO fitted to the model and the data."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import datasets
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainingArguments

from nio_hf.core import Collective, IterationRecord, NIOResult, initialize
from nio_hf.errors import DataError, NIOMemoryError, Problem
from nio_hf.training.arguments import NIOTrainingArguments
from nio_hf.training.checkpoints import (
    INIT_DIR_NAME,
    can_reload,
    ensure_writable,
    is_marked,
    reload,
    save_initialised,
)
from nio_hf.training.layers import register_transformers_layers
from nio_hf.training.losses import ignores_num_items
from nio_hf.training.replica import copy_parameters, make_replica
from nio_hf.training.reporting import NIOReportCallback
from nio_hf.training.sampling import nio_dataloader

logger = logging.getLogger(__name__)

_DONE = "_nio_initialised"


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class NIOTrainerMixin(_Base):
    """NIO for any subclass of [`~transformers.Trainer`]: `class MyNIOTrainer(NIOTrainerMixin, MyTrainer)`.

    NIO runs once, after the data loader is built and before optimizer and wrapping. It is skipped on resume, for a
    model loaded from an initialised checkpoint, and for one that this process has initialised already. It uses the
    Trainer's own `compute_loss`, collator and data set; batches and random numbers of the training are the same as
    without it.

    Besides, `resume_from_checkpoint` and `load_best_model_at_end` restore every tensor, and the loss of models that
    ignore `num_items_in_batch` is not inflated under gradient accumulation.

    Attributes:
        nio_result: of the last NIO run of this trainer; None before.
    """

    args: NIOTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        args, kwargs = _with_nio_arguments(args, kwargs)
        super().__init__(*args, **kwargs)
        self.nio_result: NIOResult | None = None
        if ignores_num_items(self._nio_model()):
            self.model_accepts_loss_kwargs = False
        self._nio_report = NIOReportCallback(self)
        self.add_callback(self._nio_report)
        if self.args.nio and self.args.warmup_steps > 0:
            logger.warning(
                "NIO and warmup_steps=%s are both on: their effects cannot be told apart. Set warmup_steps=0 to train "
                "without warmup, or nio=False.",
                self.args.warmup_steps,
            )

    def run_nio(self) -> NIOResult:
        """Initialise the model now, and save the initialised checkpoint where `nio_save_init` is set.

        Returns:
            What was learned, also kept as `nio_result`.

        Raises:
            NIOError: in every case with the model as it was, see [`initialize`].
        """
        config = self.args.to_nio_config()
        if self.args.nio_save_init and self.args.should_save:
            ensure_writable(self.nio_init_dir.parent)
        model = self._nio_model()
        collective = Collective.current()
        register_transformers_layers(model)
        with _isolated_random_state(self.args.device), self._nio_progress(config.iterations) as bar, _memory_errors():
            replica = make_replica(model, self.args.device, collective)
            result = initialize(
                replica,
                self._nio_batches(),
                self.compute_nio_loss,
                config,
                on_iteration=lambda record: _advance(bar, record),
                collective=collective,
            )
            if self.args.nio_save_init and self.args.should_save:
                save_initialised(replica, result, self.nio_init_dir, self.processing_class)
            copy_parameters(replica, model)
        setattr(model, _DONE, True)
        self.nio_result = result
        self._nio_report.report_later(result)
        self.accelerator.wait_for_everyone()
        return result

    @property
    def nio_init_dir(self) -> Path:
        """Where the initialised checkpoint is saved."""
        return Path(cast(str, self.args.output_dir)) / INIT_DIR_NAME

    def compute_nio_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Mean loss of a batch for NIO: the Trainer's own, on fp32 inputs. Override it for another one."""
        prepared = self._prepare_inputs(dict(inputs))
        loss = self.compute_loss(model, {name: _float32(value) for name, value in prepared.items()})
        return cast(torch.Tensor, loss)

    def get_nio_dataloader(self) -> DataLoader[Any]:
        """The held-out batches of NIO, then one per iteration.

        Raises:
            DataError: without training data, or with too little.
        """
        if self.train_dataset is None:
            raise DataError(Problem("train_dataset", "None", "Give NIOTrainer a training data set"))
        dataset, collate = self.train_dataset, self.data_collator
        if isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
            dataset = self._remove_unused_columns(dataset, description="NIO")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="NIO")
        config = self.args.to_nio_config()
        return nio_dataloader(
            dataset,
            collate,
            batch_size=self.args.nio_batch_size,
            holdout_batches=config.holdout_batches,
            iterations=config.iterations,
            seed=config.seed,
            num_workers=self.args.dataloader_num_workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )

    def _nio_model(self) -> nn.Module:
        return cast(nn.Module, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _nio_batches(self) -> Iterator[Any]:
        num_labels = getattr(getattr(self._nio_model(), "config", None), "num_labels", None)
        for number, batch in enumerate(self.get_nio_dataloader()):
            _check_labels(batch, num_labels, number)
            yield batch

    def _nio_progress(self, iterations: int) -> Any:
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        return tqdm(total=iterations, desc="NIO", unit="iteration", disable=hidden)

    def _nio_is_due(self, resume_from_checkpoint: str | None) -> bool:
        model = self._nio_model()
        if not self.args.nio:
            return False
        if resume_from_checkpoint is not None:
            logger.info("NIO is skipped: training resumes from %s.", resume_from_checkpoint)
            return False
        if getattr(model, _DONE, False) or is_marked(model):
            logger.info("NIO is skipped: the model is initialised already.")
            return False
        return True

    # What follows overrides Trainer.

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader[Any], resume_from_checkpoint: str | None
    ) -> Any:
        if self._nio_is_due(resume_from_checkpoint):
            self.run_nio()
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._nio_reload(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._nio_reload(cast(str, self.state.best_model_checkpoint)):
            super()._load_best_model()

    def _nio_reload(self, checkpoint: str) -> bool:
        """Restore a checkpoint strictly where that is possible."""
        model = self._nio_model()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not can_reload(Path(checkpoint), model):
            return False
        reload(Path(checkpoint), cast(PreTrainedModel, model))
        return True


class NIOTrainer(NIOTrainerMixin, Trainer):
    """A drop-in for [`~transformers.Trainer`] that initialises the model with NIO before it trains.

    It takes the arguments of Trainer, with [`NIOTrainingArguments`] for the settings of NIO; plain
    `TrainingArguments` mean the default settings.
    """


def _with_nio_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of Trainer, with `args` turned into `NIOTrainingArguments` where they are not."""
    positional = len(args) > 1
    given = args[1] if positional else kwargs.get("args")
    if isinstance(given, NIOTrainingArguments):
        return args, kwargs
    if given is None:
        given = TrainingArguments(output_dir="tmp_trainer")
    fields = {field.name: getattr(given, field.name) for field in dataclasses.fields(given) if field.init}
    converted = NIOTrainingArguments(**fields)
    if positional:
        return (args[0], converted, *args[2:]), kwargs
    return args, {**kwargs, "args": converted}


def _advance(bar: Any, record: IterationRecord) -> None:
    bar.set_postfix(GC=f"{record.grad_cosine:.3f}", GN=f"{record.grad_norm:.3g}", step=record.branch, refresh=False)
    bar.update()


def _check_labels(batch: Any, num_labels: int | None, number: int) -> None:
    labels = batch.get("labels") if hasattr(batch, "get") else None
    if not isinstance(labels, torch.Tensor) or labels.ndim != 1 or labels.is_floating_point():
        return
    if num_labels is None or num_labels < 2:
        return
    wrong = labels[((labels < 0) | (labels >= num_labels)) & (labels != -100)]
    if len(wrong):
        found = f"label {int(wrong[0])} for a model of {num_labels} classes"
        fix = "Set num_labels in the model config to the number of classes, counted from 0"
        raise DataError(Problem(f"labels of NIO batch {number}", found, fix))


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@contextlib.contextmanager
def _isolated_random_state(device: torch.device) -> Iterator[None]:
    """Leave the random state of Python, NumPy and torch as it was found."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Turn an out-of-memory of NIO into ours: it must not shrink the training batch (`auto_find_batch_size`)."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        fix = "Set nio_micro_batch_size, or lower nio_batch_size"
        raise NIOMemoryError(Problem("NIO", f"out of memory ({error})", fix)) from error
