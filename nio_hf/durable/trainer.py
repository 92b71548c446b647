"""Checkpoints that survive any end of a training, for any Trainer."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from nio_hf.core import Collective
from nio_hf.durable import manifest
from nio_hf.durable.isolation import isolated_random_state
from nio_hf.durable.preemption import PreemptionCallback, SpareWorkers
from nio_hf.durable.restoring import restore, unpickling_errors, weights_only
from nio_hf.errors import CheckpointError, ConfigError, Preempted, Problem
from nio_hf.files import ensure_writable, only_writer, output_errors

logger = logging.getLogger(__name__)

AUTO = "auto"
GO_ON = f"Start again with resume_from_checkpoint={AUTO} to go on."

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class TrainerMixin(_Base):
    """Common base of the mixins of this package.

    Attributes:
        preemption: Callback that listens for SIGTERM; None without [`DurableTrainerMixin`] or `enable_jit_checkpoint`.
        resumed_from: Folder that the last training resumed from; None for a new training or without that mixin.
    """

    preemption: PreemptionCallback | None = None
    resumed_from: Path | None = None

    @property
    def unwrapped_model(self) -> nn.Module:
        """Model without the wrappers of the training."""
        return cast(nn.Module, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _tell(self, logger: logging.Logger, message: str, *values: Any, level: int = logging.INFO) -> None:
        """Log a message on the main process."""
        if self.is_world_process_zero():
            logger.log(level, message, *values)


class DurableTrainerMixin(TrainerMixin):
    """Checkpoints that survive any end of the training: `class MyTrainer(DurableTrainerMixin, Trainer)`.

    - `train(resume_from_checkpoint="auto")` goes on from the newest usable checkpoint, or begins.
    - Each checkpoint gets a manifest when all its files are written, those of callbacks included. A checkpoint whose
      files do not match its manifest is passed over, and older ones are deleted only when the new manifest exists.
    - `resume_from_checkpoint` and `load_best_model_at_end` restore every tensor, see [`restore`].
    - With `enable_jit_checkpoint`, SIGTERM saves a checkpoint at the end of a step and ends with [`Preempted`].
    - One training at a time writes into an `output_dir`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        handler = signal.getsignal(signal.SIGTERM)
        super().__init__(*args, **kwargs)
        self._trial: Any = None
        self._begun_at, self._epochs = -1, 0
        self._given: dict[str, Any] = {}
        self._loading = self._training = contextlib.ExitStack()
        if self.pop_callback(JITCheckpointCallback) is not None:
            # Trainer listens as soon as it is made, long before it can save anything.
            signal.signal(signal.SIGTERM, handler)
            self.preemption = PreemptionCallback()
            self.add_callback(self.preemption)
        self._sealing = _SealingCallback(self)
        self.add_callback(self._sealing)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as in Trainer; `resume_from_checkpoint` may also be "auto".

        True stands for the newest usable checkpoint in `output_dir`, and "auto" for the same or, without one, a new
        training.

        Raises:
            ConfigError: Settings that write checkpoints which cannot be resumed from.
            CheckpointError: A checkpoint that is missing or not whole; a subclass of ValueError.
            OutputError: An `output_dir` that cannot be written.
            Preempted: A SIGTERM, after a save; a subclass of SystemExit.
        """
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and "SHARDED" in str(plugin.state_dict_type):
            found = "SHARDED_STATE_DICT: such checkpoints are unpickled when they are read, and hold no model to load"
            raise ConfigError(Problem("fsdp_state_dict_type", found, "Set it to FULL_STATE_DICT"))
        collective, self._trial = Collective.current(), trial
        with contextlib.ExitStack() as self._training:
            if self.preemption is not None:
                self._training.enter_context(self.preemption.listening())
            with collective.together():
                if self.args.should_save:
                    ensure_writable(self._run_dir)
                    self._training.enter_context(only_writer(self._run_dir))
                checkpoint = self._checkpoint_for(resume_from_checkpoint, collective)
                state = str(checkpoint / TRAINER_STATE_NAME) if checkpoint is not None else None
                self._begun_at = -1 if state is None else int(TrainerState.load_from_json(state).global_step)
            self.resumed_from = checkpoint
            # The sealing callback comes last, since other callbacks write into a checkpoint, too.
            self.remove_callback(self._sealing)
            self.add_callback(self._sealing)
            self._training.enter_context(unpickling_errors(checkpoint))
            self._loading = self._training.enter_context(contextlib.ExitStack())
            if checkpoint is not None and self.is_deepspeed_enabled:
                self._loading.enter_context(weights_only())
            output = super().train(None if checkpoint is None else str(checkpoint), trial, ignore_keys_for_eval)
            if self._is_stopped:
                collective.wait()
                message = f"SIGTERM: saved and stopped at step {self.state.global_step}. {GO_ON}"
                self._tell(logger, message, level=logging.WARNING)
                raise Preempted(message)
        if self._begun_at >= self.state.max_steps:
            message = "%s is the end of that training: it was loaded, nothing was trained."
            self._tell(logger, message, checkpoint, level=logging.WARNING)
        return output

    @property
    def _run_dir(self) -> Path:
        """Folder of the checkpoints; each trial of a hyper-parameter search has its own."""
        return Path(self._get_output_dir(self._trial))

    @property
    def _is_stopped(self) -> bool:
        """Whether SIGTERM has stopped this training."""
        return self.preemption is not None and self.preemption.stopped

    def _checkpoint_for(self, asked: str | bool | None, collective: Collective) -> Path | None:
        """Return the folder to resume from, the same on all processes; None for a new training."""
        if not asked:
            return None
        if asked != AUTO and asked is not True:
            manifest.check_checkpoint(Path(asked), verify=self.args.should_save)
            return Path(asked)
        with collective.together():
            listed = manifest.candidates(self._run_dir) if collective.rank == 0 else []

        def fault_anywhere(directory: Path) -> str | None:
            """Return the fault on this machine, or "" for one elsewhere: with `save_on_each_node` each has a copy."""
            with collective.together():
                fault = manifest.checkpoint_fault(directory) if self.args.should_save else None
            return (fault or "") if collective.any(fault is not None)[0] else None

        found = manifest.newest_usable(collective.broadcast_object(listed), fault_anywhere)
        if found is None and asked is True:
            fix = f"Start without it, or with {AUTO!r}, which begins where there is none"
            raise CheckpointError(Problem(str(self._run_dir), "no checkpoint that can be used", fix))
        if found is None:
            self._tell(logger, "No usable checkpoint in %s: beginning.", self._run_dir)
            return None
        self._tell(logger, "Resuming from %s.", found)
        if not manifest.has_manifest(found):
            self._tell(logger, "%s has no manifest: it may be incomplete.", found, level=logging.WARNING)
        return found

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """Return no epochs for a training that was resumed at its end, where Trainer would take another step."""
        values: Any = super().set_initial_training_values(*args, **kwargs)
        self._epochs, *others = values
        return (0, *others) if self._begun_at >= others[-1] else values

    # Saving

    @contextlib.contextmanager
    def _showing_trainer(self, **arguments: Any) -> Iterator[None]:
        """Show other arguments to Trainer within the context; [`save_model`] still saves those of the user."""
        former, outer = {name: getattr(self.args, name) for name in arguments}, self._given
        self._given = {**former, **outer}
        vars(self.args).update(arguments)
        try:
            yield
        finally:
            vars(self.args).update(former)
            self._given = outer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as in Trainer; a schedule-free optimizer saves the weights that it evaluates."""
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None)):
            optimizer.eval()
        with self._showing_trainer(**self._given):
            super().save_model(output_dir, _internal_call)

    def _complete_checkpoint(self) -> None:
        """Seal the checkpoint of this step when all processes have written their files, and delete old ones."""
        collective, directory = Collective.current(), self._checkpoint_dir
        collective.wait()
        with collective.together():
            # A callback may have moved it elsewhere.
            if self.args.should_save and (directory / TRAINER_STATE_NAME).is_file():
                with output_errors(directory, delete=True):
                    manifest.write_manifest(directory)
        with collective.together():
            if self.args.should_save:
                best = self.state.best_model_checkpoint
                limit = self._given.get("save_total_limit", self.args.save_total_limit)
                manifest.rotate(self._run_dir, limit, [directory] if best is None else [directory, Path(best)])

    @property
    def _checkpoint_dir(self) -> Path:
        return self._run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    # Data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the data loader of Trainer, with workers that survive a SIGTERM."""
        return self._spare_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return the data loader of Trainer, with workers that survive a SIGTERM."""
        return self._spare_workers(super().get_eval_dataloader(eval_dataset))

    def _spare_workers(self, loader: Any) -> DataLoader[Any]:
        # The loader of accelerate iterates over the one inside.
        inner = getattr(loader, "base_dataloader", loader)
        has_workers = getattr(inner, "num_workers", 0) > 0
        if self.preemption is not None and has_workers and not isinstance(inner.worker_init_fn, SpareWorkers):
            inner.worker_init_fn = SpareWorkers(inner.worker_init_fn)
        return cast(DataLoader[Any], loader)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as in Trainer; with `enable_jit_checkpoint` without an effect on the random state."""
        # A SIGTERM may leave an evaluation out.
        is_apart = self.preemption is not None and self.is_in_train
        with isolated_random_state(self.args.device) if is_apart else contextlib.nullcontext():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    # Private methods of Trainer; tests/test_private.py says why they are overridden

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # FSDP and DeepSpeed let the processes talk while they save, and so does the choice of the best checkpoint.
        talks = self.is_fsdp_enabled or self.is_deepspeed_enabled or self.state.best_global_step
        collective = Collective.current()
        with (
            contextlib.nullcontext() if talks else collective.together(),
            output_errors(self._checkpoint_dir, delete=self.args.should_save),
        ):
            with collective.together():
                if self.args.should_save:
                    manifest.begin(self._checkpoint_dir)
            # Trainer would delete old checkpoints before this one is sealed.
            with self._showing_trainer(save_total_limit=None):
                super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._restore_converted(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = cast(str, self.state.best_model_checkpoint)
        with unpickling_errors(Path(best)), weights_only() if self.is_deepspeed_enabled else contextlib.nullcontext():
            if not self._restore_converted(best):
                super()._load_best_model()

    def _restore_converted(self, checkpoint: str) -> bool:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        with Collective.current().together():
            return restore(Path(checkpoint), self.unwrapped_model)


class _SealingCallback(TrainerCallback):
    """Completes each checkpoint, after all callbacks that write into it."""

    def __init__(self, trainer: DurableTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """End the special loading: the checkpoint to resume from has been read."""
        self._trainer._loading.close()
        state.num_train_epochs = self._trainer._epochs

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Protect the checkpoint of SIGTERM: Trainer would save the best ones only, and delete others."""
        if self._trainer._is_stopped:
            saves = SaveStrategy.STEPS if args.save_strategy == SaveStrategy.BEST else args.save_strategy
            shown = self._trainer._showing_trainer(save_strategy=saves, save_total_limit=None)
            self._trainer._training.enter_context(shown)

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Complete the checkpoint of this step."""
        self._trainer._complete_checkpoint()
