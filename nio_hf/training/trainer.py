"""`NIOTrainer`: the Trainer, from an initialisation that NIO fitted to the model and the data."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from nio_hf.core import (
    NIO,
    Collective,
    GradientInspection,
    IterationRecord,
    NIOConfig,
    NIOResult,
    NIOState,
    Resumption,
    expected_cost,
    find_tensors,
    initialize,
    inspect_gradients,
    squared_gradients,
)
from nio_hf.core.batches import map_tensors
from nio_hf.core.initializer import INITIALISED
from nio_hf.core.memory import is_out_of_memory
from nio_hf.errors import DataError, ModelError, NIOMemoryError, Problem, StoppedError
from nio_hf.training.arguments import NIOTrainingArguments, checked_arguments
from nio_hf.training.checkpoints import (
    PROGRESS_NAME,
    Task,
    describe_state,
    ensure_writable,
    find_state,
    is_marked,
    load_initialised,
    load_progress,
    origin_of,
    plain_values,
    read_state,
    remove_mark,
    save_initialised,
    save_progress,
)
from nio_hf.training.digests import batch_digest, fingerprint
from nio_hf.training.isolation import isolated_random_state
from nio_hf.training.losses import ignores_num_items
from nio_hf.training.methods import METHODS, run_baseline
from nio_hf.training.naming import in_arguments, named_as_arguments
from nio_hf.training.nio_batches import CheckedBatches
from nio_hf.training.preemption import SpareWorkers
from nio_hf.training.publishing import PublishingTrainerMixin
from nio_hf.training.replica import broadcast, gathered, make_replica, replica_bytes, take_over
from nio_hf.training.reporting import NIOReportCallback
from nio_hf.training.sampling import nio_dataloader, seed_everything
from nio_hf.training.seeding import SeedMode, check_seedable, seed_second_moment

logger = logging.getLogger(__name__)


class NIOTrainerMixin(PublishingTrainerMixin):
    """NIO for any subclass of [`~transformers.Trainer`]: `class MyNIOTrainer(NIOTrainerMixin, MyTrainer)`.

    NIO runs once, after the data loader is built and before optimizer and wrapping. It is skipped on resume, for a
    model loaded from an initialised checkpoint, and for one that this process has initialised already. It uses the
    Trainer's own `compute_loss`, collator and data set; batches and random numbers of the training are the same as
    without it.

    Besides, nothing is lost, see [`DurableTrainerMixin`], and the loss of models that ignore `num_items_in_batch` is
    not inflated under gradient accumulation.

    Attributes:
        nio_result: of the last NIO run of this trainer; None before.
    """

    args: NIOTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        args, kwargs = checked_arguments(args, kwargs)
        super().__init__(*args, **kwargs)
        self.nio_result: NIOResult | None = None
        if not self._has_own_loss() and ignores_num_items(self._nio_model()):
            self.model_accepts_loss_kwargs = False
        self._nio_report = NIOReportCallback(self)
        self.add_callback(self._nio_report)

    def run_nio(self, *, resume: bool = False) -> NIOResult:
        """Initialise the model now, and save the initialised checkpoint where `nio_save_init` is set.

        Args:
            resume: go on where an earlier run in the same `output_dir` stopped, with the same model and settings; or
                take over what it has finished.

        Returns:
            What was learned, also kept as `nio_result`.

        Raises:
            NIOError: in every case with the model as it was, see [`initialize`].
            NIOMemoryError: also where NIO cannot fit into memory, before it starts.
            OutputError: where the disk is full or cannot be written, before NIO starts where that can be known.
            Preempted: where SIGTERM ended it, with `enable_jit_checkpoint`.
        """
        collective = Collective.current()
        self._warn_of_warmup()
        model = self._nio_model()
        try:
            with (
                self._listening(),
                collective.together(),
                isolated_random_state(self.args.device, self.train_dataset),
                named_as_arguments(),
                _memory_errors(),
            ):
                self._check_output(model)
                self._check_not_wrapped()
                replica = make_replica(model, self.args.device, collective)
                task = self._nio_task(replica, resume)
                result = self._initialised(replica, task, collective) if resume else None
                if result is None:
                    result = self._initialise(replica, task, collective, resume)
                if collective.size > 1:
                    collective.check_equal("the initialised weights", fingerprint(replica))
                take_over(replica, model, collective)
        except StoppedError as error:
            raise self._preempted(f"during NIO, {error.problems[0].found}") from error
        INITIALISED.add(model)
        self.nio_result = result
        self._nio_report.report_later(result, model)
        return result

    def inspect(self) -> GradientInspection:
        """Measure where in the model the gradients of sub-batches agree, on the report batches of NIO.

        The model is left as it is, trained or not. On the model before and after NIO, it gives what NIO measured.

        Raises:
            NIOError: as in [`inspect_gradients`].
        """
        with self._reported("Inspecting") as reported:
            return inspect_gradients(self._nio_model(), reported, self.compute_nio_loss, self.args.to_nio_config())

    def squared_gradients(self, batches: int | None = None) -> dict[str, torch.Tensor]:
        """Squared gradient at the weights as they are, which `nio_seed_optimizer` seeds the optimizer with.

        It is that of the gradient of a step of the training, clipped to `max_grad_norm`.

        Args:
            batches: number of report batches of NIO to measure on; None for all.

        Returns:
            {parameter name: tensor of its shape}.

        Raises:
            NIOError: as in [`squared_gradients`].
        """
        collective = Collective.current()
        with self._reported("Squared gradients", batches) as reported, collective.together():
            replica = make_replica(self._nio_model(), self.args.device, collective)
            config = self.args.to_nio_config()
            max_norm = self.args.max_grad_norm if self.args.max_grad_norm and self.args.max_grad_norm > 0 else None
            return squared_gradients(
                replica,
                reported,
                self.compute_nio_loss,
                config,
                training_batch_size=self.get_total_train_batch_size(self.args),
                max_norm=max_norm,
                collective=collective,
            )

    @contextlib.contextmanager
    def _reported(self, what: str, batches: int | None = None) -> Iterator[Iterable[Any]]:
        """The report batches of NIO, behind a progress bar; errors and random numbers as in a NIO run."""
        config, count = self.args.to_nio_config(), batches or self.args.nio_report_batches
        with isolated_random_state(self.args.device, self.train_dataset), named_as_arguments(), _memory_errors():
            seed_everything(config.seed)
            source = CheckedBatches(self.get_nio_dataloader(), self._classes_of_labels(), self.prepare_nio_batch)
            hidden = self.args.disable_tqdm or not self.is_world_process_zero()
            yield tqdm(itertools.islice(source, count), total=count, desc=what, unit="batch", disable=hidden)

    def _initialised(self, replica: nn.Module, task: Task, collective: Collective) -> NIOResult | None:
        """The result of an earlier run, with its weights in the replica; None where there is none that fits."""
        result = None
        with collective.together():
            if collective.rank == 0:
                result = load_initialised(self.nio_init_dir, replica, task)
                self._nio_state = None if result is None else read_state(self.nio_init_dir)
        result = collective.broadcast_object(result)
        if result is not None:
            broadcast(replica, collective)
            self._tell("NIO is finished: taking over %s.", self.nio_init_dir)
        return result

    def _initialise(self, replica: nn.Module, task: Task, collective: Collective, resume: bool) -> NIOResult:
        """Run NIO on the replica and save what comes of it."""
        config = self.args.to_nio_config()
        directory = self.nio_init_dir.parent
        with collective.together():
            state = load_progress(directory, task) if resume and collective.rank == 0 else None
        state = collective.broadcast_object(state)
        if state is not None:
            self._tell("NIO goes on after %d iterations.", state.iterations)

        batches = CheckedBatches(self.get_nio_dataloader(), self._classes_of_labels(), self.prepare_nio_batch)

        def save(state: NIOState) -> None:
            if self.args.should_save:
                save_progress(state, directory, {**task, "data": batches.digest})

        resumption = Resumption(
            state=state,
            save=save,
            every=self.args.nio_save_steps or None,
            should_stop=lambda: self._preemption is not None and self._preemption.requested,
        )
        seed_everything(config.seed)
        method, options = METHODS[self.args.nio_method], cast(dict[str, Any], self.args.nio_method_kwargs or {})
        with self._nio_progress(replica, config) as bar:
            for record in () if state is None else state.progress.history:
                _advance(bar, record)
            watched: dict[str, Any] = {
                "on_iteration": functools.partial(_advance, bar),
                "on_trial": lambda tried: bar.set_description_str(f"{method.title}: {tried}"),
            }
            task_of_method = (replica, batches, self.compute_nio_loss, config)
            if method is NIO:
                result = initialize(*task_of_method, **watched, collective=collective, resumption=resumption)
            else:
                result = run_baseline(method, options, *task_of_method, collective, **watched)
            _finish(bar, result, method.title)
        result = dataclasses.replace(result, message=in_arguments(result.message))
        self._tell_result(result)
        with collective.together():
            if self.args.should_save:
                self._nio_state = describe_state(replica, result, {**task, "data": batches.digest})
            if self._nio_state is not None and self.args.nio_save_init:
                save_initialised(replica, self._nio_state, self.nio_init_dir, self.processing_class, self._describe)
                (directory / PROGRESS_NAME).unlink(missing_ok=True)
        return result

    def _nio_task(self, replica: nn.Module, resume: bool) -> Task:
        """What NIO is given: weights, settings, and the first batch, which is read beforehand where it is to resume."""
        config, first = self.args.to_nio_config(), None
        if resume and self.is_world_process_zero():
            seed_everything(config.seed)
            first = batch_digest(next(iter(self.get_nio_dataloader())))
        return plain_values(
            {
                "weights": fingerprint(replica),
                "settings": dataclasses.asdict(config),
                "method": self.args.nio_method,
                "method_kwargs": self.args.nio_method_kwargs or {},
                "batch_size": self.args.nio_batch_size,
                "label_smoothing_factor": self.args.label_smoothing_factor,
                "data": first,
            }
        )

    def _check_not_wrapped(self) -> None:
        if getattr(self, "deepspeed", None) is not None:
            fix = "Call run_nio() before train(), or leave it to train()"
            raise ModelError(Problem("model", "DeepSpeed holds a copy of its weights already", fix))

    def _check_output(self, model: nn.Module) -> None:
        """Find out before NIO starts whether there is room for what this run is going to save."""
        if not self.args.should_save:
            return
        copies = float(self.args.nio_save_init)
        if self.is_in_train and self.args.save_strategy != SaveStrategy.NO:
            copies += 1 if self.args.save_only_model or "adam" not in self.args.optim else 3
        ensure_writable(self.nio_init_dir.parent, round(copies * replica_bytes(model)))

    def compute_nio_loss(self, model: nn.Module, inputs: Any) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Loss of a batch for NIO: the Trainer's own, on fp32 inputs. Override it for another one.

        Returns:
            The mean loss over the samples, or (loss_sum, weight) where it is a mean over something else, e.g. tokens:
            with `nio_micro_batch_size` the parts of a sub-batch are combined by that weight.
        """
        inputs = _float32(self._prepare_inputs(inputs))
        function = self.compute_loss_func
        if function is None or type(self).compute_loss is not Trainer.compute_loss or "labels" not in inputs:
            return cast(torch.Tensor, self.compute_loss(model, inputs))
        # Trainer always tells such a function the number of labels, by which it may divide.
        labels = inputs.pop("labels")
        loss: torch.Tensor = function(model(**inputs), labels, num_items_in_batch=(labels != -100).sum())
        return loss

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
        """The report batches of NIO, then those that it searches on.

        Raises:
            DataError: without training data, or with too little.
            ConfigError: for options of a method that are out of range.
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
        config, method = self.args.to_nio_config(), METHODS[self.args.nio_method]
        options = method.checked(cast(dict[str, Any], self.args.nio_method_kwargs or {}))
        return nio_dataloader(
            dataset,
            collate,
            batch_size=self.args.nio_batch_size,
            report_batches=config.report_batches,
            further_batches=method.batches(config, options),
            seed=config.seed,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            worker_init_fn=None if self._preemption is None else SpareWorkers(None),
        )

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

    def _nio_progress(self, replica: nn.Module, config: NIOConfig) -> Any:
        """A bar in training steps, whose end is what the run may cost at most; it says so beforehand."""
        method = METHODS[self.args.nio_method]
        groups = len(find_tensors(replica, config.scaled_tensors, config.groups).groups) if method is NIO else 1
        cost = expected_cost(config, groups, method, cast(dict[str, Any], self.args.nio_method_kwargs or {}))
        if cost is not None and self.args.nio_method != "none":
            self._tell(
                "%s will cost %.0f training steps of %d samples at most.",
                method.title,
                cost,
                self.args.nio_batch_size,
            )
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        return tqdm(total=cost, desc=method.title, unit="step", disable=hidden, bar_format=_bar_format(cost))

    def _tell_result(self, result: NIOResult) -> None:
        """Log what NIO achieved, as a warning where that calls for a look."""
        if self.is_world_process_zero():
            sound = result.status in ("improved", "applied", "changed", "unchanged")
            logger.log(logging.INFO if sound else logging.WARNING, "%s", result.message)

    def _nio_is_due(self, resume_from_checkpoint: str | None) -> bool:
        """Whether NIO has something to do, which rank 0 decides."""
        if not self.args.nio:
            return False
        if resume_from_checkpoint is not None:
            self._tell("NIO is skipped: training resumes from %s.", resume_from_checkpoint)
            return False
        model, collective = self._nio_model(), Collective.current()
        if collective.first(model in INITIALISED):
            self._tell("NIO is skipped: it has initialised this model already. Call run_nio() to run it again.")
            return False
        with collective.together(), gathered(model):
            marked = self.is_world_process_zero() and is_marked(model)
        if collective.first(marked):
            self._tell("NIO is skipped: the model was loaded from an initialised checkpoint.")
            if self.is_world_process_zero():
                self._started_from, self._nio_state = origin_of(model)
            remove_mark(model)
            INITIALISED.add(model)
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
        seeds = self.args.nio_seed_optimizer is not None and resume_from_checkpoint is None
        if seeds:
            check_seedable(self)
        if self._nio_is_due(resume_from_checkpoint):
            self.run_nio(resume=self._going_on)
        elif resume_from_checkpoint is not None or not self._nio_report.is_of(self._nio_model()):
            self._nio_report.forget()
        if resume_from_checkpoint is not None:
            self._nio_state = find_state(Path(resume_from_checkpoint))
        # Trackers that were added later must have opened their run before NIO is reported.
        self.remove_callback(self._nio_report)
        self.add_callback(self._nio_report)
        squares = self.squared_gradients() if seeds else {}
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if seeds:
            optimizer = cast(torch.optim.Optimizer, self.optimizer)
            if optimizer is self._nio_report.seeded:
                # This training begins again, in smaller batches.
                optimizer.state.clear()
            seed_second_moment(optimizer, self._nio_model(), squares, cast(SeedMode, self.args.nio_seed_optimizer))
            self._nio_report.seeded = optimizer
        return prepared


class NIOTrainer(NIOTrainerMixin, Trainer):
    """A drop-in for [`~transformers.Trainer`] that initialises the model with NIO before it trains.

    It takes the arguments of Trainer, with [`NIOTrainingArguments`] for the settings of NIO; plain
    `TrainingArguments` mean the default settings.
    """


def _bar_format(total: float | None) -> str:
    """How a bar in training steps looks, whose end may not be known."""
    if not total:
        return "{desc}: {n:.0f} steps [{elapsed}{postfix}]"
    return "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} steps [{elapsed}{postfix}]"


def _advance(bar: Any, record: IterationRecord) -> None:
    """Move a bar by what an iteration cost, and show what it found."""
    values = {"GC": record.grad_cosine, "GN": record.grad_norm, "loss": record.loss}
    shown = {name: f"{value:.3g}" for name, value in values.items() if value is not None}
    bar.set_postfix(**shown, last=record.outcome.replace("_", " "), refresh=False)
    # A bar in this format cannot be drawn beyond its end.
    bar.total = bar.total and max(bar.total, bar.n + record.cost)
    bar.update(record.cost)


def _finish(bar: Any, result: NIOResult, title: str) -> None:
    """Move a bar to its end, which is what the run did cost."""
    bar.set_description_str(title, refresh=False)
    bar.total = bar.total and result.cost
    bar.update(result.cost - bar.n)
    bar.refresh()


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
