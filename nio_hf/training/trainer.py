"""`NIOTrainer`: the Trainer, from an initialisation that NIO fitted to the model and the data."""

from __future__ import annotations

import contextlib
import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainingArguments

from nio_hf.core import Collective, IterationRecord, NIOResult, initialize
from nio_hf.core.batches import map_tensors
from nio_hf.core.memory import is_out_of_memory
from nio_hf.core.scales import check_storage
from nio_hf.errors import DataError, NIOMemoryError, Problem
from nio_hf.training.arguments import NIOTrainingArguments, with_nio_settings
from nio_hf.training.checkpoints import (
    INIT_DIR_NAME,
    can_reload,
    ensure_writable,
    is_marked,
    reload,
    remove_mark,
    save_initialised,
)
from nio_hf.training.isolation import isolated_random_state
from nio_hf.training.layers import register_transformers_layers
from nio_hf.training.losses import ignores_num_items
from nio_hf.training.replica import copy_buffers, copy_parameters, make_replica
from nio_hf.training.reporting import NIOReportCallback
from nio_hf.training.sampling import nio_dataloader, seed_everything

logger = logging.getLogger(__name__)

_INITIALISED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The models that this process has initialised."""

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
        args, kwargs = _checked_arguments(args, kwargs)
        super().__init__(*args, **kwargs)
        self.nio_result: NIOResult | None = None
        if not self._has_own_loss() and ignores_num_items(self._nio_model()):
            self.model_accepts_loss_kwargs = False
        self._nio_report = NIOReportCallback(self)
        self.add_callback(self._nio_report)

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
        self._warn_of_warmup()
        model = self._nio_model()
        collective = Collective.current()
        register_transformers_layers()
        with isolated_random_state(self.args.device, self.train_dataset), _memory_errors():
            seed_everything(config.seed)
            replica = make_replica(model, self.args.device, collective)
            with self._nio_progress(config.iterations) as bar:
                result = initialize(
                    replica,
                    _CheckedBatches(self.get_nio_dataloader(), self._classes_of_labels(), self.prepare_nio_batch),
                    self.compute_nio_loss,
                    config,
                    on_iteration=lambda record: _advance(bar, record),
                    collective=collective,
                )
            if self.args.nio_save_init and self.args.should_save:
                save_initialised(replica, result, self.nio_init_dir, self.processing_class)
            copy_parameters(replica, model)
            if collective.size > 1:
                copy_buffers(replica, model)
        _INITIALISED.add(model)
        self.nio_result = result
        self._nio_report.report_later(result)
        self.accelerator.wait_for_everyone()
        return result

    @property
    def nio_init_dir(self) -> Path:
        """Where the initialised checkpoint is saved; each trial of a hyper-parameter search has its own."""
        return Path(self._get_output_dir(getattr(self, "_trial", None))) / INIT_DIR_NAME

    def compute_nio_loss(self, model: nn.Module, inputs: Any) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Loss of a batch for NIO: the Trainer's own, on fp32 inputs. Override it for another one.

        Returns:
            The mean loss over the samples, or (loss_sum, weight) where it is a mean over something else, e.g. tokens:
            with `nio_micro_batch_size` the parts of a sub-batch are combined by that weight.
        """
        loss = self.compute_loss(model, _float32(self._prepare_inputs(inputs)))
        return cast(torch.Tensor, loss)

    def get_nio_dataset(self) -> Any:
        """The samples of NIO: the training data set. Override it for others, e.g. without augmentation."""
        return self.train_dataset

    def prepare_nio_batch(self, batch: Any, number: int) -> Any:
        """A batch of NIO as the loss reads it, once for all passes over it. Override it for augmentation of batches.

        Args:
            batch: as the collator made it.
            number: of the batch, from 0; what is drawn must depend on it and the seed alone.
        """
        return batch

    def get_nio_dataloader(self) -> DataLoader[Any]:
        """The held-out batches of NIO, then one per iteration.

        Raises:
            DataError: without training data, or with too little.
        """
        dataset = self.get_nio_dataset()
        if dataset is None:
            raise DataError(Problem("train_dataset", "None", "Give NIOTrainer a training data set"))
        _check_has_samples(dataset)
        # A collator may draw from a generator of its own, which training goes on with.
        collate = copy.deepcopy(self.data_collator)
        if isinstance(dataset, datasets.Dataset):
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
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )

    def _nio_model(self) -> nn.Module:
        return cast(nn.Module, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _has_own_loss(self) -> bool:
        """Whether the loss is not the model's own."""
        return self.compute_loss_func is not None or type(self).compute_loss is not Trainer.compute_loss

    def _classes_of_labels(self) -> int | None:
        """Number of classes that labels can have, where that is known."""
        model: Any = self._nio_model()
        classifies = type(model).__name__.endswith(("ForImageClassification", "ForSequenceClassification"))
        if self._has_own_loss() or not classifies or not type(model).__module__.startswith("transformers."):
            return None
        num_labels: int = model.config.num_labels
        return num_labels if num_labels > 1 else None

    def _warn_of_warmup(self) -> None:
        if self.args.warmup_steps > 0 and self.is_world_process_zero():
            logger.warning(
                "NIO and warmup_steps=%s are both on: their effects cannot be told apart. Set warmup_steps=0 to train "
                "without warmup, or nio=False.",
                self.args.warmup_steps,
            )

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
        if model in _INITIALISED:
            logger.warning("NIO is skipped: it has initialised this model already. Call run_nio() to run it again.")
            return False
        if is_marked(model):
            logger.info("NIO is skipped: the model was loaded from an initialised checkpoint.")
            remove_mark(model)
            _INITIALISED.add(model)
            return False
        return True

    # What follows overrides Trainer.

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in Trainer.

        Raises:
            DataError: for a data set without samples.
        """
        _check_has_samples(self.train_dataset)
        return super().get_train_dataloader()

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader[Any], resume_from_checkpoint: str | None
    ) -> Any:
        if self._nio_is_due(resume_from_checkpoint):
            self.run_nio()
        # Trackers that were added later must have opened their run before NIO is reported.
        self.remove_callback(self._nio_report)
        self.add_callback(self._nio_report)
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


def _checked_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of Trainer, its `args` with the settings of NIO beside them.

    Raises:
        ConfigError: where `args` are no TrainingArguments.
        ModelError: for a model without data, on the meta device.
    """
    model = args[0] if args else kwargs.get("model")
    if isinstance(model, nn.Module) and any(parameter.is_meta for parameter in model.parameters()):
        check_storage(model)
    given = args[1] if len(args) > 1 else kwargs.get("args")
    settings = with_nio_settings(TrainingArguments(output_dir="tmp_trainer") if given is None else given)
    if len(args) > 1:
        return (args[0], settings, *args[2:]), kwargs
    return args, {**kwargs, "args": settings}


def _advance(bar: Any, record: IterationRecord) -> None:
    bar.set_postfix(GC=f"{record.grad_cosine:.3f}", GN=f"{record.grad_norm:.3g}", step=record.branch, refresh=False)
    bar.update()


class _CheckedBatches:
    """Prepared batches whose labels are checked; a re-iterable."""

    def __init__(self, batches: DataLoader[Any], classes: int | None, prepare: Callable[[Any, int], Any]) -> None:
        self._batches = batches
        self._classes = classes
        self._prepare = prepare

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self._batches):
            if self._classes is not None:
                _check_labels(batch, self._classes, number)
            yield self._prepare(batch, number)


def _check_labels(batch: Any, classes: int, number: int) -> None:
    labels = batch.get("labels") if hasattr(batch, "get") else None
    if not isinstance(labels, torch.Tensor) or labels.ndim != 1 or labels.is_floating_point():
        return
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != -100)]
    if len(wrong):
        found = f"label {int(wrong[0])} for a model of {classes} classes"
        fix = "Set num_labels in the model config to the number of classes, counted from 0"
        raise DataError(Problem(f"labels of NIO batch {number}", found, fix))


def _check_has_samples(dataset: Any) -> None:
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise DataError(Problem("train_dataset", "no samples", "Give a data set with samples"))


def _float32(value: Any) -> Any:
    """Inputs with their floating point tensors in fp32, whatever they are nested in."""
    return map_tensors(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, value)


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Turn an out-of-memory of NIO into ours: it must not shrink the training batch (`auto_find_batch_size`)."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fix = "Set nio_micro_batch_size, or lower nio_batch_size"
        raise NIOMemoryError(Problem("NIO", f"out of memory ({error})", fix)) from error
