"""`NIOTrainer`: the Trainer, from an initialisation that NIO fitted to the model and the data."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.utils import is_datasets_available

from nio_hf.core import Collective, GradientInspection, NIOConfig, NIOResult, inspect_gradients, squared_gradients
from nio_hf.core.batches import map_tensors
from nio_hf.core.initializer import INITIALISED
from nio_hf.durable import AUTO, GO_ON, DurableTrainerMixin, TrainerMixin
from nio_hf.durable.preemption import SpareWorkers
from nio_hf.errors import ConfigError, DataError, Preempted, Problem, StoppedError
from nio_hf.hub.run_folder import INIT_DIR_NAME, STATE_NAME, State, find_state, write_state
from nio_hf.hub.trainer import HubTrainerMixin
from nio_hf.trainer.apart import computing_apart
from nio_hf.trainer.arguments import NIOSettings, check_arguments, order_seed
from nio_hf.trainer.checkpoints import is_marked, origin_of, remove_mark
from nio_hf.trainer.early_checks import check_before_nio, check_best_metric
from nio_hf.trainer.methods import METHODS
from nio_hf.trainer.race import Candidates, hold_race, planned_steps, steps_of_training
from nio_hf.trainer.replica import copied_to_cpu, gathered, make_replica, own_forward, take_over
from nio_hf.trainer.reporting import NIOReportCallback
from nio_hf.trainer.running import NIORun, checked_batches
from nio_hf.trainer.sampling import nio_dataloader, seed_everything
from nio_hf.trainer.seeding import SeedMode, check_seedable, seed_second_moment

logger = logging.getLogger(__name__)


class NIOTrainerMixin(TrainerMixin):
    """NIO for any subclass of [`~transformers.Trainer`], and nothing else.

        class MyTrainer(NIOTrainerMixin, SFTTrainer): ...

    NIO runs once, after the data loader is built and before optimizer and wrapping. It is skipped on resume, for a
    model loaded from an initialised checkpoint, and for one that this process has initialised already. It uses the
    Trainer's own `compute_loss`, collator and data set. Batches and random numbers of the training are the same as
    without it, and so is what `compute_loss` counts and logs.

    Attributes:
        nio_args: Settings of NIO, of `args` where those have any.
        nio_result: Result of the last NIO run of this trainer; None before.
        nio_state: Content of `nio_state.json` about the run that initialised the model; None without one.
        started_from: Name on the Hub of the initialised checkpoint that the model was loaded from; None without one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_arguments(args[0] if args else kwargs.get("model"), args[1] if len(args) > 1 else kwargs.get("args"))
        self.nio_result: NIOResult | None = None
        self.started_from: str | None = None
        self.nio_state: State | None = None
        self._nio_trial: Any = None
        self._resumes_nio = False
        self._apart: Trainer | None = None
        self._candidates: Candidates | None = None
        self._max_steps: int | None = None
        self.is_lane = False
        super().__init__(*args, **kwargs)
        self.has_own_optimizer = self.optimizer is not None or self.lr_scheduler is not None
        own: Any = self.args
        self.nio_args = own if isinstance(own, NIOSettings) else NIOSettings()
        self._nio_report = NIOReportCallback(self)
        self.add_callback(self._nio_report)

    # What to run, and what it gives

    def run_nio(self, *, resume: bool = False) -> NIOResult:
        """Initialise the model now, and save the initialised checkpoint where `nio_save_init` is set.

        Args:
            resume: Take over what an earlier run in the same `output_dir` has finished, with the same model, data and
                settings.

        Returns:
            What was learned, also kept as `nio_result`.

        Raises:
            NIOError: In every case with the model as it was, see [`initialize`].
            NIOMemoryError: Also where NIO cannot fit into memory, before it starts.
            OutputError: Where the disk is full or cannot be written, before NIO starts where that can be known.
            Preempted: Where SIGTERM ended it, with `enable_jit_checkpoint`.
        """
        collective, model, preemption = Collective.current(), self.unwrapped_model, self.preemption
        try:
            with (
                contextlib.nullcontext() if preemption is None else preemption.listening(),
                collective.together(),
                computing_apart(self),
            ):
                check_before_nio(self, model)
                replica = make_replica(model, self.args.device, collective)
                start = copied_to_cpu(replica) if self.race_steps else {}
                result = NIORun(self, replica, collective, resume=resume).carry_out()
                take_over(replica, model, collective)
        except StoppedError as error:
            self._stop(error)
        INITIALISED.add(model)
        # The weights that are taken over from an earlier run may have won its race already.
        self._candidates = Candidates(start, result) if start and result.race is None else None
        self._keep(result)
        return result

    def run_race(self, max_steps: int | None = None) -> NIOResult | None:
        """Train the weights that NIO has found, and the start, for some steps, and keep the better ones.

        `train` does so by itself, where `nio_race_steps` says so or leaves it open and it is worth its price. See
        `nio_hf.trainer.race` for how.

        Args:
            max_steps: Steps of the training; None for those of the arguments.

        Returns:
            The result of NIO with the race, also kept as `nio_result`; None where there is no race to be held.

        Raises:
            ConfigError: Where `nio_race_steps` asks for a race that cannot be held.
            NIOMemoryError: Where a copy of the training does not fit into memory.
            Preempted: Where SIGTERM ended it, with `enable_jit_checkpoint`.
        """
        self._max_steps = max_steps or self._max_steps
        candidates, steps, self._candidates = self._candidates, self.race_steps, None
        is_of_model = self._nio_report.is_of(self.unwrapped_model)
        if candidates is None or not is_of_model or not steps or len(candidates.names) < 2:
            return None
        try:
            result = hold_race(self, candidates, steps)
        except StoppedError as error:
            self._stop(error)
        self._keep(result)
        return result

    @property
    def race_steps(self) -> int:
        """Steps of each lane of a race before the training; 0 for no race.

        Raises:
            ConfigError: Where `nio_race_steps` asks for a race that cannot be held.
        """
        return planned_steps(self, self._max_steps or steps_of_training(self))

    def _keep(self, result: NIOResult) -> None:
        self.nio_result = result
        self._nio_report.report_later(result, self.unwrapped_model)

    def _stop(self, error: StoppedError) -> NoReturn:
        # One that exits first would break what the others still receive.
        Collective.current().wait()
        (problem,) = error.problems
        message = f"SIGTERM: during {problem.where}, {problem.found}. {GO_ON}"
        self._tell(logger, message, level=logging.WARNING)
        raise Preempted(message) from error

    def inspect(self) -> GradientInspection:
        """Measure where in the model the gradients of sub-batches agree, on the report batches of NIO.

        The model is left as it is, trained or not. On the model before and after NIO, it gives what NIO measured.

        Raises:
            NIOError: As in [`inspect_gradients`].
        """
        model = self.unwrapped_model
        with computing_apart(self), own_forward(model):
            reported = self._report_batches("Inspecting")
            return inspect_gradients(model, reported, self.compute_nio_loss, self.nio_config)

    def squared_gradients(self, batches: int | None = None) -> dict[str, torch.Tensor]:
        """Squared gradient at the weights as they are, which `nio_seed_optimizer` seeds the optimizer with.

        It is that of the gradient of a step of the training, clipped to `max_grad_norm`.

        Args:
            batches: Number of report batches of NIO to measure on; None for all.

        Returns:
            {parameter name: tensor of its shape}.

        Raises:
            NIOError: As in [`squared_gradients`].
        """
        collective, max_norm = Collective.current(), self.args.max_grad_norm
        with computing_apart(self), collective.together():
            return squared_gradients(
                make_replica(self.unwrapped_model, self.args.device, collective),
                self._report_batches("Squared gradients", batches),
                self.compute_nio_loss,
                self.nio_config,
                training_batch_size=self.get_total_train_batch_size(self.args),
                max_norm=max_norm if max_norm and max_norm > 0 else None,
                collective=collective,
            )

    @property
    def nio_config(self) -> NIOConfig:
        """The settings of NIO as those of core."""
        return self.nio_args.nio_config(order_seed(self.args))

    @property
    def nio_init_dir(self) -> Path:
        """Where the initialised checkpoint is saved; each trial of a hyper-parameter search has its own."""
        return Path(self._get_output_dir(self._nio_trial)) / INIT_DIR_NAME

    def describe(self, directory: Path) -> None:
        """Write beside a model how NIO initialised it; where it did not, what an earlier run wrote there is removed."""
        if self.nio_state is None:
            (directory / STATE_NAME).unlink(missing_ok=True)
        else:
            write_state(self.nio_state, directory)

    def _report_batches(self, what: str, batches: int | None = None) -> Iterable[Any]:
        """The report batches of NIO, behind a progress bar."""
        count = batches or self.nio_args.nio_report_batches
        seed_everything(self.nio_config.seed)
        source = itertools.islice(checked_batches(self), count)
        return tqdm(source, total=count, desc=what, unit="batch", disable=self._hides_progress)

    @property
    def _hides_progress(self) -> bool:
        """Whether this process shows no progress bars."""
        return bool(self.args.disable_tqdm) or not self.is_world_process_zero()

    # Loss and data of NIO, to be overridden

    def compute_nio_loss(self, model: nn.Module, inputs: Any) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Loss of a batch for NIO: the Trainer's own, on fp32 inputs. Override it for another one.

        Returns:
            The mean loss over the samples, or (loss_sum, weight) where it is a mean over something else, e.g. tokens:
            with `nio_micro_batch_size` the parts of a sub-batch are combined by that weight.
        """
        inputs = _float32(self._prepare_inputs(inputs))
        trainer = self._apart or self
        function = trainer.compute_loss_func
        if function is None or type(self).compute_loss is not Trainer.compute_loss or "labels" not in inputs:
            return cast(torch.Tensor, trainer.compute_loss(model, inputs))
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
            batch: Batch as the collator made it.
            number: Number of the batch, from 0. Random numbers must depend on it and the seed alone.
        """
        return batch

    def nio_identity(self) -> dict[str, Any]:
        """Everything that NIO depends on beside weights, data and arguments, in values that JSON can hold.

        Override it where the loss or the batches of NIO depend on settings of your own: `resume_from_checkpoint="auto"`
        takes over an earlier run of NIO only where all that it depends on is the same.
        """
        return {}

    def get_nio_dataloader(self) -> DataLoader[Any]:
        """The report batches of NIO, then those that it searches on.

        Raises:
            DataError: Without training data, or with too little.
            ConfigError: Options of a method that are out of range.
        """
        dataset = self.get_nio_dataset()
        if dataset is None:
            fix = "Give one, override get_nio_dataset where get_train_dataloader is your own, or set nio=False"
            raise DataError(Problem("train_dataset", "None, and NIO takes its samples from it", fix))
        if hasattr(dataset, "__len__") and len(dataset) == 0:
            raise DataError(Problem("train_dataset", "no samples", "Give a data set with samples"))
        # A collator may draw from a generator of its own, which training goes on with.
        collate = copy.deepcopy(self.data_collator)
        if _is_table(dataset):
            dataset = self._remove_unused_columns(dataset, description="NIO")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="NIO")
        config, method = self.nio_config, METHODS[self.nio_args.nio_method]
        return nio_dataloader(
            dataset,
            collate,
            batch_size=self.nio_args.nio_batch_size,
            report_batches=config.report_batches,
            further_batches=method.batches(config, method.checked(self.nio_args.nio_method_options)),
            seed=config.seed,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            # Releases of transformers before 5.19 do not have it.
            multiprocessing_context=getattr(self.args, "dataloader_multiprocessing_context", None),
            worker_init_fn=None if self.preemption is None else SpareWorkers(None),
        )

    # What follows overrides Trainer; _prepare_for_training is private, see tests/test_private.py

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer, after NIO; with "auto", which [`DurableTrainerMixin`] knows, a finished NIO is taken over."""
        check_best_metric(self)
        self._resumes_nio = resume_from_checkpoint == AUTO
        self._nio_trial = args[0] if args else kwargs.get("trial")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer, with what NIO did beside the model."""
        if self.args.should_save:
            directory = Path(str(output_dir or self.args.output_dir))
            directory.mkdir(parents=True, exist_ok=True)
            NIOTrainerMixin.describe(self, directory)
        super().save_model(output_dir, _internal_call)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader[Any], resume_from_checkpoint: str | None
    ) -> Any:
        seeds = self.nio_args.nio_seed_optimizer is not None and resume_from_checkpoint is None
        if seeds:
            check_seedable(self)
        if not self.is_lane:
            self._initialise(max_steps, resume_from_checkpoint)
        squares = self.squared_gradients() if seeds else {}
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if seeds:
            optimizer = cast(torch.optim.Optimizer, self.optimizer)
            if optimizer is self._nio_report.seeded:
                # This training begins again, in smaller batches.
                optimizer.state.clear()
            mode = cast(SeedMode, self.nio_args.nio_seed_optimizer)
            seed_second_moment(optimizer, self.unwrapped_model, squares, mode)
            self._nio_report.seeded = optimizer
        return prepared

    def _initialise(self, max_steps: int, resume_from_checkpoint: str | None) -> None:
        """Run NIO and hold the race where they are due, and see to it that they are reported."""
        self._max_steps = max_steps
        if resume_from_checkpoint is not None:
            self._candidates = None
        if self._nio_is_due(resume_from_checkpoint):
            self.run_nio(resume=self._resumes_nio)
        elif resume_from_checkpoint is not None or not self._nio_report.is_of(self.unwrapped_model):
            self._nio_report.forget()
        if resume_from_checkpoint is not None:
            self.nio_state = find_state(Path(resume_from_checkpoint))
        remove_mark(self.unwrapped_model)
        self.run_race()
        # Trackers that were added later must have opened their run before NIO is reported.
        self.remove_callback(self._nio_report)
        self.add_callback(self._nio_report)

    def _nio_is_due(self, resume_from_checkpoint: str | None) -> bool:
        """Whether NIO has something to do, which rank 0 decides."""
        if not self.nio_args.nio:
            return False
        if resume_from_checkpoint is not None:
            self._tell(logger, "NIO is skipped: training resumes from %s.", resume_from_checkpoint)
            return False
        model, collective = self.unwrapped_model, Collective.current()
        if collective.first(model in INITIALISED):
            self._tell(logger, "NIO is skipped: it has initialised this model already. Call run_nio() to run it again.")
            return False
        with collective.together(), gathered(model):
            marked = self.is_world_process_zero() and is_marked(model)
        if collective.first(marked):
            self._tell(logger, "NIO is skipped: the model was loaded from an initialised checkpoint.")
            if self.is_world_process_zero():
                self.started_from, self.nio_state = origin_of(model)
            INITIALISED.add(model)
            return False
        return True


class NIOTrainer(NIOTrainerMixin, HubTrainerMixin, DurableTrainerMixin, Trainer):
    """A drop-in for [`~transformers.Trainer`] that initialises the model with NIO before it trains.

    It takes the arguments of Trainer, with [`NIOTrainingArguments`] for the settings of NIO; plain
    `TrainingArguments` mean the default settings. Beside NIO it has checkpoints that survive what ends a training, see
    [`DurableTrainerMixin`], and model cards that say how the model came about, see [`HubTrainerMixin`].
    """

    def describe(self, directory: Path) -> None:
        """Write beside a model how it came about."""
        NIOTrainerMixin.describe(self, directory)
        HubTrainerMixin.describe(self, directory)

    def folder_to_push(self) -> Path:
        """The initialised checkpoint before the training, `output_dir` otherwise.

        Raises:
            ConfigError: Where the initialised checkpoint is not saved.
        """
        if self.state.global_step or self.nio_result is None:
            return super().folder_to_push()
        if not (self.nio_init_dir / STATE_NAME).is_file():
            fix = "Set nio_save_init=True, or push after the training"
            raise ConfigError(Problem("push_to_hub", "the initialised checkpoint is not saved", fix))
        return self.nio_init_dir


def _is_table(dataset: Any) -> bool:
    """Whether a data set is one of `datasets` with columns, which is not needed for others."""
    if not is_datasets_available():
        return False
    import datasets

    return isinstance(dataset, datasets.Dataset)


def _float32(value: Any) -> Any:
    """Inputs with their floating point tensors in fp32, whatever they are nested in."""
    return map_tensors(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, value)
