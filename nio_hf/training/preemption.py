"""SIGTERM, as schedulers send it before they take a machine away: save, stop, and say so with the exit status."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any, cast

from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.optimization import GreedyLR
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback
from transformers.trainer_utils import SaveStrategy

from nio_hf.core import Collective

_SCHEDULED_BY_EVALUATION = (ReduceLROnPlateau, GreedyLR)


class PreemptionCallback(JITCheckpointCallback):
    """The callback of `enable_jit_checkpoint`, for any number of processes.

    Trainer's own saves wherever it happens to be, each process by itself. This one saves at the end of a step, the
    same step on all processes as soon as one of them got the signal, by Trainer's usual way of saving a checkpoint,
    callbacks included. An evaluation that is due then is left out unless the weights depend on it: by the choice of
    the best checkpoint, or of the learning rate.

    Args:
        former: the callback that Trainer made; its signal handler is used.

    Attributes:
        stopped: whether this training has been stopped.
    """

    def __init__(self, former: JITCheckpointCallback) -> None:
        super().__init__()
        self.trainer = former.trainer
        self.stopped = False
        self._manager = cast(CheckpointManager, former.jit_manager)
        # A half-written checkpoint does no harm, so there is no need to wait and see whether SIGKILL follows.
        self._manager.kill_wait = 0
        # Trainer listens from the moment that it is made, long before it can save anything.
        signal.signal(signal.SIGTERM, self._manager._original_sigterm_handler or signal.SIG_DFL)

    @property
    def requested(self) -> bool:
        """Whether this process got the signal."""
        return self._manager.is_checkpoint_requested

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Wait for the signal within the context; the handler that was there before is put back."""
        former = signal.getsignal(signal.SIGTERM)
        if former == self._manager._sigterm_handler:
            yield
            return
        self.stopped = self._manager.is_checkpoint_requested = False
        self._manager.setup_signal_handler()
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, former)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have a checkpoint saved and the training stopped, on all processes at once."""
        if Collective.current().any(self.requested)[0]:
            self.stopped = True
            control.should_training_stop = True
            control.should_save = True
            scheduled = isinstance(kwargs.get("lr_scheduler"), _SCHEDULED_BY_EVALUATION)
            needed = scheduled or args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST
            control.should_evaluate = control.should_evaluate and needed

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do nothing that belongs to the end of an epoch that was not reached."""
        scheduled = isinstance(kwargs.get("lr_scheduler"), _SCHEDULED_BY_EVALUATION)
        reached = float(state.epoch or 0.0).is_integer()
        if self.stopped and not (reached and (scheduled or args.load_best_model_at_end)):
            control.should_save = control.should_evaluate = control.should_log = False

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Not here: half a step cannot be resumed from."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Not here: the batch of this step is drawn already."""

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Not here: `listening` puts the handler back."""
