"""Checkpoints that survive whatever ends a training, for any Trainer."""

from __future__ import annotations

import contextlib
import logging
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from nio_hf.core import Collective
from nio_hf.durable.isolation import isolated_random_state
from nio_hf.durable.manifest import (
    begin,
    candidates,
    check_checkpoint,
    checkpoint_fault,
    has_manifest,
    newest_usable,
    rotate,
    write_manifest,
)
from nio_hf.durable.mixin import TrainerMixin
from nio_hf.durable.preemption import PreemptionCallback, SpareWorkers
from nio_hf.durable.restoring import restore
from nio_hf.durable.unpickling import weights_only
from nio_hf.errors import CheckpointError, ConfigError, Preempted, Problem
from nio_hf.files import ensure_writable, only_writer, output_errors

logger = logging.getLogger(__name__)

AUTO = "auto"
GO_ON = f"Start again with resume_from_checkpoint={AUTO} to go on."


class DurableTrainerMixin(TrainerMixin):
    """Checkpoints that survive whatever ends the training: `class MyTrainer(DurableTrainerMixin, Trainer)`.

    - `train(resume_from_checkpoint="auto")` goes on from the newest checkpoint that can be used, or begins.
    - Each checkpoint gets a manifest of its files once all of them are written, those of callbacks included. One whose
      files do not match its manifest is passed over, and older ones are deleted only when it is there.
    - `resume_from_checkpoint` and `load_best_model_at_end` restore every tensor, see [`restore`].
    - With `enable_jit_checkpoint`, SIGTERM saves a checkpoint at the end of a step and ends with [`Preempted`].
    - One training at a time writes into an `output_dir`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        handler = signal.getsignal(signal.SIGTERM)
        super().__init__(*args, **kwargs)
        self._trial: Any = None
        self._save_total_limit: int | None = None
        self._holds_limit = False
        self._loading = contextlib.ExitStack()
        if self.pop_callback(JITCheckpointCallback) is not None:
            # Trainer listens from the moment that it is made, long before it can save anything.
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
        """As in Trainer.

        Args:
            resume_from_checkpoint: a folder; True for the newest checkpoint in `output_dir` that can be used; "auto"
                for the same, or for the start where there is none.
            trial: as in Trainer.
            ignore_keys_for_eval: as in Trainer.

        Raises:
            ConfigError: for settings of checkpoints that cannot be resumed from.
            CheckpointError: for a checkpoint that is missing or not whole; it is a ValueError.
            OutputError: where `output_dir` cannot be written.
            Preempted: where SIGTERM ended it; it is a SystemExit.
        """
        self._check_state_dict_type()
        collective = Collective.current()
        self._trial = trial
        with contextlib.ExitStack() as held:
            if self.preemption is not None:
                held.enter_context(self.preemption.listening())
            with collective.together():
                if self.args.should_save:
                    ensure_writable(self._run_dir)
                    held.enter_context(only_writer(self._run_dir))
                checkpoint = self._checkpoint_for(resume_from_checkpoint, collective)
            self.resumed_from = checkpoint
            begun_at = -1 if checkpoint is None else _step_of(checkpoint)
            # Other callbacks write into a checkpoint, too.
            self.remove_callback(self._sealing)
            self.add_callback(self._sealing)
            held.callback(self._release_limit)
            held.enter_context(_explained(checkpoint))
            self._loading = held.enter_context(contextlib.ExitStack())
            if checkpoint is not None and self.is_deepspeed_enabled:
                self._loading.enter_context(weights_only())
            output = super().train(None if checkpoint is None else str(checkpoint), trial, ignore_keys_for_eval)
            if self._is_stopped:
                collective.wait()
                message = f"SIGTERM: saved and stopped at step {self.state.global_step}. {GO_ON}"
                self._tell(logger, message, level=logging.WARNING)
                raise Preempted(message)
        if output.global_step == begun_at >= self.state.max_steps:
            self._tell(
                logger,
                "%s is the end of that training: it was loaded, nothing was trained.",
                checkpoint,
                level=logging.WARNING,
            )
        return output

    # Where checkpoints are and which of them can be used

    @property
    def _run_dir(self) -> Path:
        """Where checkpoints are saved; each trial of a hyper-parameter search has its own."""
        return Path(self._get_output_dir(self._trial))

    def _checkpoint_for(self, asked: str | bool | None, collective: Collective) -> Path | None:
        """The folder to resume from, the same on all processes; None to begin."""
        if asked is None or asked is False:
            return None
        if asked != AUTO and asked is not True:
            check_checkpoint(Path(asked), verify=self.args.should_save)
            return Path(asked)
        with collective.together():
            listed = candidates(self._run_dir) if collective.rank == 0 else []

        def fault_anywhere(directory: Path) -> str | None:
            """Machines without a shared disk have a copy each (`save_on_each_node`); who finds a fault says so."""
            with collective.together():
                fault = checkpoint_fault(directory) if self.args.should_save else None
            anywhere = collective.any(fault is not None)[0]
            return (fault or "") if anywhere else None

        found = newest_usable(collective.broadcast_object(listed), fault_anywhere)
        if found is None and asked is True:
            fix = f"Start without it, or with {AUTO!r}, which begins where there is none"
            raise CheckpointError(Problem(str(self._run_dir), "no checkpoint that can be used", fix))
        self._tell(
            logger, "Resuming from %s." if found else "No usable checkpoint in %s: beginning.", found or self._run_dir
        )
        if found is not None and not has_manifest(found):
            self._tell(logger, "%s has no manifest: nobody knows whether it is whole.", found, level=logging.WARNING)
        return found

    def _check_state_dict_type(self) -> None:
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and "SHARDED" in str(plugin.state_dict_type):
            found = "SHARDED_STATE_DICT: such checkpoints are unpickled when they are read, and hold no model to load"
            raise ConfigError(Problem("fsdp_state_dict_type", found, "Set it to FULL_STATE_DICT"))

    # Saving

    def _complete_checkpoint(self) -> None:
        """Seal the checkpoint of this step once all processes and callbacks have written theirs; delete old ones."""
        collective = Collective.current()
        directory = self._run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        collective.wait()
        with collective.together():
            # Callbacks may have moved it away.
            if self.args.should_save and (directory / TRAINER_STATE_NAME).is_file():
                with output_errors(directory, delete=True):
                    write_manifest(directory)
        with collective.together():
            if self.args.should_save:
                best = self.state.best_model_checkpoint
                keep = [directory] if best is None else [directory, Path(best)]
                rotate(self._run_dir, self.args.save_total_limit, keep)
        if self._is_stopped:
            # The end of a training deletes all checkpoints but the best one, where one is to be kept.
            self._hold_limit()

    def _hold_limit(self) -> None:
        """Let Trainer delete no checkpoint."""
        if not self._holds_limit:
            self._save_total_limit, self._holds_limit = self.args.save_total_limit, True
            self.args.save_total_limit = None

    def _release_limit(self) -> None:
        if self._holds_limit:
            self.args.save_total_limit, self._holds_limit = self._save_total_limit, False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer; the weights of a schedule-free optimizer are those that it evaluates at."""
        holds, optimizer = self._holds_limit, cast(Any, self.optimizer)
        # It saves the arguments, too, which are to be as the user gave them.
        self._release_limit()
        if callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None)):
            optimizer.eval()
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            if holds:
                self._hold_limit()

    # Data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in Trainer, with workers that SIGTERM leaves alone."""
        return cast(DataLoader[Any], self._spared(super().get_train_dataloader()))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """As in Trainer, with workers that SIGTERM leaves alone."""
        return cast(DataLoader[Any], self._spared(super().get_eval_dataloader(eval_dataset)))

    def _spared(self, loader: Any) -> Any:
        # The loader of accelerate iterates over the one inside.
        inner = getattr(loader, "base_dataloader", loader)
        has_workers = getattr(inner, "num_workers", 0) > 0
        if self.preemption is not None and has_workers and not isinstance(inner.worker_init_fn, SpareWorkers):
            inner.worker_init_fn = SpareWorkers(inner.worker_init_fn)
        return loader

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Trainer; with `enable_jit_checkpoint` no part of the randomness of the training."""
        # SIGTERM leaves evaluations out.
        is_apart = self.preemption is not None and self.is_in_train
        with isolated_random_state(self.args.device) if is_apart else contextlib.nullcontext():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    # Private methods of Trainer, see nio_hf.private

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        directory = self._run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        # FSDP and DeepSpeed let the processes talk while they save, and so does the choice of the best checkpoint.
        talks = self.is_fsdp_enabled or self.is_deepspeed_enabled or self.state.best_global_step
        collective = Collective.current()
        with (
            contextlib.nullcontext() if talks else collective.together(),
            output_errors(directory, delete=self.args.should_save),
        ):
            with collective.together():
                if self.args.should_save:
                    begin(directory)
            # Trainer would delete old checkpoints before this one is sealed.
            self._hold_limit()
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._release_limit()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer finds out that it has arrived only after another step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        # It decides whether `save_strategy="best"` saves.
        is_best: bool = super()._determine_best_metric(*args, **kwargs)
        return is_best or self._is_stopped

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._restored(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = cast(str, self.state.best_model_checkpoint)
        with _explained(Path(best)), weights_only() if self.is_deepspeed_enabled else contextlib.nullcontext():
            if not self._restored(best):
                super()._load_best_model()

    def _restored(self, checkpoint: str) -> bool:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        with Collective.current().together():
            return restore(Path(checkpoint), self.unwrapped_model)

    @property
    def _is_stopped(self) -> bool:
        """Whether SIGTERM has stopped this training."""
        return self.preemption is not None and self.preemption.stopped


class _SealingCallback(TrainerCallback):
    """Completes each checkpoint; it must come after all callbacks that write into one."""

    def __init__(self, trainer: DurableTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Load as usual again: the checkpoint that was resumed from is read."""
        self._trainer._loading.close()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Complete the checkpoint of this step."""
        self._trainer._complete_checkpoint()


@contextlib.contextmanager
def _explained(checkpoint: Path | None) -> Iterator[None]:
    """Say what it means where torch refuses to unpickle a file of a checkpoint: its own text advises to run code."""
    try:
        yield
    except pickle.UnpicklingError as error:
        found = "Weights only load failed: a file holds more than tensors and plain values, and may run code"
        raise CheckpointError(Problem(str(checkpoint), found, "Do not use it unless you know who wrote it")) from error


def _step_of(checkpoint: Path) -> int:
    return int(TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step)
