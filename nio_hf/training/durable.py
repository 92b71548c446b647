"""A Trainer from which nothing is lost: checkpoints that are known to be whole, resumed in every tensor, on SIGTERM."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from nio_hf.core import Collective
from nio_hf.errors import CheckpointError, ConfigError, Preempted, Problem
from nio_hf.training.checkpoints import ensure_writable
from nio_hf.training.isolation import isolated_random_state
from nio_hf.training.manifest import (
    begin,
    candidates,
    fault_of,
    foreign,
    newest_verified,
    rotate,
    write_manifest,
)
from nio_hf.training.preemption import PreemptionCallback, SpareWorkers
from nio_hf.training.resuming import can_reload, check_checkpoint, plain_values_only, reload
from nio_hf.training.saving import only_writer, output_errors
from nio_hf.training.unpickling import weights_only

logger = logging.getLogger(__name__)

AUTO = "auto"

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class DurableTrainerMixin(_Base):
    """Checkpoints that survive whatever ends the training, for any subclass of [`~transformers.Trainer`].

    `train(resume_from_checkpoint="auto")` goes on from the newest checkpoint that is whole, or begins. Every checkpoint
    gets a manifest of its files when all of them are written; one whose files do not match it is never used. With
    `enable_jit_checkpoint`, SIGTERM saves a checkpoint at the end of a step and ends with [`Preempted`].
    `resume_from_checkpoint` and `load_best_model_at_end` restore every tensor.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._going_on = False
        self._trial: Any = None
        self._held_limit: int | None = None
        former = self.pop_callback(JITCheckpointCallback)
        self._preemption = None if former is None else PreemptionCallback(cast(JITCheckpointCallback, former))
        if self._preemption is not None:
            self.add_callback(self._preemption)
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
            resume_from_checkpoint: a folder; True for the newest whole checkpoint in `output_dir`; "auto" for the
                same, or for the start where there is none.
            trial: as in Trainer.
            ignore_keys_for_eval: as in Trainer.

        Raises:
            ConfigError: for settings of checkpoints that cannot be resumed from.
            CheckpointError: for a checkpoint that is missing or not whole.
            OutputError: where `output_dir` cannot be written.
            Preempted: where SIGTERM ended it; it is a SystemExit.
        """
        self._check_state_dict_type()
        collective = Collective.current()
        self._going_on = resume_from_checkpoint == AUTO
        self._trial = trial
        with contextlib.ExitStack() as held:
            held.enter_context(self._listening())
            with collective.together():
                if self.args.should_save:
                    ensure_writable(self._run_dir)
                    held.enter_context(only_writer(self._run_dir))
                checkpoint = self._checkpoint_for(resume_from_checkpoint, collective)
            output = super().train(checkpoint, trial, ignore_keys_for_eval)
            if self._stopped:
                collective.wait()
                raise self._preempted(f"saved and stopped at step {self.state.global_step}")
        if checkpoint is not None and self._initial_global_step >= self.state.max_steps:
            self._tell(
                "%s is the end of that training: it was loaded, nothing was trained.", checkpoint, level=logging.WARNING
            )
        return output

    @property
    def _run_dir(self) -> Path:
        """Where checkpoints are saved; each trial of a hyper-parameter search has its own."""
        return Path(self._get_output_dir(self._trial))

    def _safe_loading(self) -> contextlib.AbstractContextManager[None]:
        """Nothing is unpickled but tensors and plain values."""
        return weights_only() if self.is_deepspeed_enabled else contextlib.nullcontext()

    def _check_state_dict_type(self) -> None:
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and "SHARDED" in str(plugin.state_dict_type):
            found = "SHARDED_STATE_DICT: such checkpoints are unpickled when they are read, and hold no model to load"
            raise ConfigError(Problem("fsdp_state_dict_type", found, "Set it to FULL_STATE_DICT"))

    def _nio_model(self) -> nn.Module:
        return cast(nn.Module, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _tell(self, message: str, *values: Any, level: int = logging.INFO) -> None:
        """Log a message, on the main process only."""
        if self.is_world_process_zero():
            logger.log(level, message, *values)

    def _listening(self) -> contextlib.AbstractContextManager[None]:
        """Wait for SIGTERM, where that is asked for."""
        return contextlib.nullcontext() if self._preemption is None else self._preemption.listening()

    @property
    def _stopped(self) -> bool:
        """Whether SIGTERM has stopped this training."""
        return self._preemption is not None and self._preemption.stopped

    def _preempted(self, what: str) -> Preempted:
        message = f"SIGTERM: {what}. Start again with resume_from_checkpoint=auto to go on."
        self._tell(message, level=logging.WARNING)
        return Preempted(message)

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """Let an error of one process stop all, where Trainer does not let the processes talk within the context."""
        talks = self.is_fsdp_enabled or self.is_deepspeed_enabled or self.state.best_global_step
        return contextlib.nullcontext() if talks else Collective.current().together()

    def _checkpoint_for(self, asked: str | bool | None, collective: Collective) -> str | None:
        """The folder to resume from, the same on all processes; None to begin."""
        if asked is None or asked is False:
            return None
        if asked != AUTO and asked is not True:
            check_checkpoint(Path(asked), verify=self.args.should_save)
            return str(asked)
        if self.args.save_only_model:
            fix = "Set save_only_model to false: without the state of the optimizer a training cannot go on"
            raise ConfigError(Problem("resume_from_checkpoint", f"{asked!r} with save_only_model", fix))
        with collective.together():
            listed = candidates(self._run_dir) if collective.rank == 0 else []

        def fault_anywhere(directory: Path) -> str | None:
            """Machines without a shared disk have a copy each (`save_on_each_node`); who finds a fault says so."""
            with collective.together():
                fault = fault_of(directory) if self.args.should_save else None
            anywhere = collective.any(fault is not None)[0]
            return (fault or "") if anywhere else None

        newest = newest_verified(collective.broadcast_object(listed), fault_anywhere)
        found = None if newest is None else str(newest)
        others = foreign(self._run_dir) if found is None and self.args.should_save else []
        if others:
            fix = (
                f"Give its path to go on from it, or another output_dir to begin; {AUTO!r} takes checkpoints of nio_hf"
            )
            raise CheckpointError(Problem(str(others[0]), "a checkpoint without a manifest, as Trainer writes it", fix))
        if found is None and asked is True:
            fix = f"Start without it, or with {AUTO!r}, which begins where there is none"
            raise CheckpointError(Problem(str(self._run_dir), "no checkpoint that is whole", fix))
        self._tell("Resuming from %s." if found else "No whole checkpoint in %s: beginning.", found or self._run_dir)
        return found

    def _complete_checkpoint(self) -> None:
        """Seal the checkpoint of this step once all processes and callbacks have written theirs; delete old ones."""
        collective = Collective.current()
        directory = self._run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        collective.wait()
        with collective.together():
            if self.args.should_save:
                with output_errors(directory, delete=True):
                    write_manifest(directory)
        with collective.together():
            if self.args.should_save:
                best = self.state.best_model_checkpoint
                keep = [directory] if best is None else [directory, Path(best)]
                rotate(self._run_dir, self.args.save_total_limit, keep)
        if self.args.push_to_hub:
            self._push_checkpoint(directory)

    def _push_checkpoint(self, directory: Path) -> None:
        """Push a checkpoint that is whole to the Hub."""
        super()._push_from_checkpoint(str(directory))

    @contextlib.contextmanager
    def _keeping_all(self) -> Iterator[None]:
        """Let Trainer delete no checkpoint within the context."""
        held = self.args.save_total_limit
        self._held_limit, self.args.save_total_limit = held, None
        try:
            yield
        finally:
            self._held_limit, self.args.save_total_limit = None, held

    # What follows overrides Trainer.

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        # Other callbacks write into a checkpoint, too.
        self.remove_callback(self._sealing)
        self.add_callback(self._sealing)
        with self._safe_loading() if resume_from_checkpoint is not None else contextlib.nullcontext():
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        directory = self._run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._alone(), output_errors(directory, delete=self.args.should_save):
            with Collective.current().together():
                if self.args.should_save:
                    begin(directory)
            # Trainer would delete old checkpoints before this one is known to be whole.
            with self._keeping_all():
                super()._save_checkpoint(model, trial)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        if self._preemption is not None and getattr(loader, "num_workers", 0) > 0:
            loader.worker_init_fn = SpareWorkers(loader.worker_init_fn)
        return loader

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not here: a checkpoint is pushed when it is complete."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # It saves the arguments, too, which are to be as the user gave them.
        held = self.args.save_total_limit is None
        if held:
            self.args.save_total_limit = self._held_limit
        try:
            super()._save(output_dir, state_dict)
        finally:
            if held:
                self.args.save_total_limit = None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer finds out that it has arrived only after another step.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        # One that is left out for SIGTERM must not have been part of the randomness of the training.
        with contextlib.nullcontext() if self._preemption is None else isolated_random_state(self.args.device):
            return super()._evaluate(*args, **kwargs)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        # It decides whether `save_strategy="best"` saves.
        is_best: bool = super()._determine_best_metric(*args, **kwargs)
        return is_best or self._stopped

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # It deletes all checkpoints but the best, where one is to be kept, and with them the one to go on from.
        with self._keeping_all() if self._stopped else contextlib.nullcontext():
            return super()._finalize_training(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._reload(resume_from_checkpoint):
            with plain_values_only(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with plain_values_only(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with plain_values_only(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        best = cast(str, self.state.best_model_checkpoint)
        with Collective.current().together():
            if self.args.should_save:
                check_checkpoint(Path(best), verify=True)
        if not self._reload(best):
            with self._safe_loading(), plain_values_only(best):
                super()._load_best_model()

    def _reload(self, checkpoint: str) -> bool:
        """Restore a checkpoint strictly where that is possible."""
        model = self._nio_model()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not can_reload(Path(checkpoint), model):
            return False
        with Collective.current().together():
            reload(Path(checkpoint), cast(PreTrainedModel, model))
        return True


class _SealingCallback(TrainerCallback):
    """Completes each checkpoint; it must come after all callbacks that write into one."""

    def __init__(self, trainer: DurableTrainerMixin) -> None:
        self._trainer = trainer

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Complete the checkpoint of this step."""
        self._trainer._complete_checkpoint()
