"""SIGTERM, as schedulers send it before they take a machine away: save, stop, and say so with the exit status."""

from __future__ import annotations

import signal
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from nio_hf.core import Collective


class PreemptionCallback(JITCheckpointCallback):
    """The callback of `enable_jit_checkpoint`, for any number of processes.

    Trainer's own saves wherever it happens to be, each process by itself. This one saves at the end of a step, the
    same step on all processes as soon as one of them got the signal, by Trainer's usual way of saving a checkpoint,
    callbacks included. An evaluation that is due then is left out unless the best checkpoint depends on it.

    Args:
        former: the callback that Trainer made, whose signal handler stays.

    Attributes:
        stopped: whether this training has been stopped.
    """

    def __init__(self, former: JITCheckpointCallback) -> None:
        super().__init__()
        self.trainer = former.trainer
        self.jit_manager = former.jit_manager
        self.stopped = False
        if self.jit_manager is not None:
            # A half-written checkpoint does no harm, so there is no need to wait and see whether SIGKILL follows.
            self.jit_manager.kill_wait = 0

    @property
    def requested(self) -> bool:
        """Whether this process got the signal."""
        return self.jit_manager is not None and self.jit_manager.is_checkpoint_requested

    def listen(self) -> None:
        """Wait for the signal, also after a training at whose end its handler was taken away."""
        manager = self.jit_manager
        if manager is not None and signal.getsignal(signal.SIGTERM) != manager._sigterm_handler:
            manager.setup_signal_handler()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have a checkpoint saved and the training stopped, on all processes at once."""
        if Collective.current().any(self.requested)[0]:
            self.stopped = True
            control.should_training_stop = True
            control.should_save = True
            control.should_evaluate = control.should_evaluate and args.load_best_model_at_end

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do nothing that belongs to the end of an epoch that was not reached."""
        reached = args.load_best_model_at_end and float(state.epoch or 0.0).is_integer()
        if self.stopped and not reached:
            control.should_save = control.should_evaluate = control.should_log = False

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Not here: half a step cannot be resumed from."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Not here: the batch of this step is drawn already."""
