"""SIGTERM, which schedulers send before they take a machine away: save, stop, and exit with a status of its own."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.optimization import GreedyLR
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from nio_hf.core import Collective
from nio_hf.errors import Preempted

logger = logging.getLogger(__name__)


class SpareWorkers:
    """`worker_init_fn` with which a worker of a data loader survives the first SIGTERM.

    Schedulers send SIGTERM to every process of a job. The main process then goes on to the end of the step, for which
    it may need samples of the worker. A second signal or the end of the main process ends the worker.

    Args:
        then: Former `worker_init_fn`, which is called afterwards; None without one.
    """

    def __init__(self, then: Callable[[int], Any] | None) -> None:
        self._then = then
        _end_workers_at_exit()

    def __call__(self, worker: int) -> None:
        """Prepare a worker; called in its process."""
        signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))
        if self._then is not None:
            self._then(worker)


@functools.cache
def _end_workers_at_exit() -> None:
    """Kill the remaining workers at the end of this process.

    Python sends each worker one SIGTERM and waits for its end, which would never come.
    """

    def kill_workers() -> None:
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()

    atexit.register(kill_workers)


@contextlib.contextmanager
def sigterm_handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Install a handler for SIGTERM within the context, and restore the former one after it."""
    former = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


@contextlib.contextmanager
def preempted_at_once(message: str) -> Iterator[None]:
    """Let SIGTERM end the context at once, for work after everything is saved.

    Raises:
        Preempted: A SIGTERM, with the message.
    """

    def stop(number: int, frame: object) -> None:
        logger.warning(message)
        raise Preempted(message)

    with sigterm_handled_by(stop):
        yield


class PreemptionCallback(TrainerCallback):
    """Callback of `enable_jit_checkpoint` for any number of processes, in place of the callback of Trainer.

    Trainer's callback saves at once, each process by itself. This one saves at the end of a step, the same step on all
    processes as soon as one of them has received the signal, as Trainer usually saves a checkpoint, callbacks included.
    It leaves out an evaluation that is due then, unless the weights depend on it by the choice of the best checkpoint
    or of the learning rate.

    Attributes:
        requested: Whether this process has received the signal.
        stopped: Whether the signal has stopped this training.
    """

    def __init__(self) -> None:
        self.requested = self.stopped = self._saves_at_epoch_end = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen for the signal within the context. Contexts can be nested."""
        if signal.getsignal(signal.SIGTERM) == self._request:
            yield
            return
        self.requested = self.stopped = False
        with sigterm_handled_by(self._request):
            yield

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save a checkpoint and stop the training, on all processes at once, if one has received the signal."""
        if not Collective.current().any(self.requested)[0]:
            return
        self.stopped = control.should_training_stop = True
        is_scheduled = isinstance(kwargs.get("lr_scheduler"), ReduceLROnPlateau | GreedyLR)
        evaluates = is_scheduled or args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST
        # A checkpoint that depends on the evaluation at the end of the epoch is saved once, after it: saving it twice
        # would delete the first one for a moment.
        ends_epoch = float(state.epoch or 0.0).is_integer()
        self._saves_at_epoch_end = ends_epoch and args.eval_strategy == IntervalStrategy.EPOCH and evaluates
        control.should_evaluate = control.should_evaluate and evaluates
        control.should_save = not self._saves_at_epoch_end

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Skip the work at the end of an epoch that was not reached."""
        if self.stopped:
            control.should_save = self._saves_at_epoch_end
            control.should_evaluate = control.should_evaluate and self._saves_at_epoch_end
            control.should_log = False

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
