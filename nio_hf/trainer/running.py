"""One run of NIO, or of another method, in a Trainer: made, or taken over from an earlier training, and saved."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from nio_hf.core import NIO, Collective, NIOResult, expected_cost, find_tensors, initialize
from nio_hf.hub.run_folder import changed_arguments, read_state
from nio_hf.trainer.checkpoints import Task, describe_state, load_initialised, save_initialised
from nio_hf.trainer.digests import batch_digest, fingerprint
from nio_hf.trainer.methods import METHODS, run_baseline
from nio_hf.trainer.naming import in_arguments
from nio_hf.trainer.nio_batches import CheckedBatches, classes_of_labels
from nio_hf.trainer.progress import NIOProgress
from nio_hf.trainer.replica import broadcast
from nio_hf.trainer.sampling import seed_everything

if TYPE_CHECKING:
    from nio_hf.trainer.trainer import NIOTrainerMixin

logger = logging.getLogger(__name__)

_SOUND = ("improved", "applied", "changed", "unchanged")


class NIORun:
    """A run of NIO on a copy of a Trainer's model.

    Args:
        trainer: Trainer with data, loss and settings.
        replica: Copy, whose weights are scaled.
        collective: Processes of the training.
        resume: Whether to take over what an earlier run in the same `output_dir` has finished.
    """

    def __init__(self, trainer: NIOTrainerMixin, replica: nn.Module, collective: Collective, *, resume: bool) -> None:
        self._trainer = trainer
        self._replica = replica
        self._collective = collective
        self._resume = resume
        self._config = trainer.nio_config
        self._method = METHODS[trainer.nio_args.nio_method]
        self._options = trainer.nio_args.nio_method_options
        self._task = self._find_task()

    def carry_out(self) -> NIOResult:
        """Scale the weights of the replica, or take them over from an earlier run.

        Raises:
            NIOError: As in [`initialize`].
            OutputError: Where the initialised checkpoint cannot be written.
        """
        result = self._take_over() if self._resume else None
        if result is None:
            batches = checked_batches(self._trainer)
            result = self._search(batches)
            result = dataclasses.replace(result, message=in_arguments(result.message))
            level = logging.INFO if result.status in _SOUND else logging.WARNING
            self._trainer._tell(logger, "%s", result.message, level=level)
            self._save(result, {**self._task, "data": batches.digest})
        if self._collective.size > 1:
            self._collective.check_equal("the initialised weights", fingerprint(self._replica))
        return result

    def _find_task(self) -> Task:
        """The task of the run: weights, settings and, where an earlier one may be taken over, the first batch."""
        trainer, first = self._trainer, None
        if self._resume and trainer.is_world_process_zero():
            seed_everything(self._config.seed)
            first = batch_digest(next(iter(trainer.get_nio_dataloader())))
        task = {
            "weights": fingerprint(self._replica),
            "settings": dataclasses.asdict(self._config),
            "method": self._method.name,
            "method_kwargs": self._options,
            "batch_size": trainer.nio_args.nio_batch_size,
            "label_smoothing_factor": trainer.args.label_smoothing_factor,
            "data": first,
            **trainer.nio_identity(),
        }
        if trainer.race_steps:
            task["race"] = {"steps": trainer.race_steps, "arguments": changed_arguments(trainer.args)}
        # As it comes back from JSON, so that it equals the one that was written.
        return cast(Task, json.loads(json.dumps(task)))

    def _take_over(self) -> NIOResult | None:
        """The result of an earlier run, with its weights in the replica; None where there is none that fits."""
        directory, result = self._trainer.nio_init_dir, None
        with self._collective.together():
            if self._collective.rank == 0:
                result = load_initialised(directory, self._replica, self._task)
                self._trainer.nio_state = None if result is None else read_state(directory)
        result = self._collective.broadcast_object(result)
        if result is not None:
            broadcast(self._replica, self._collective)
            self._trainer._tell(logger, "NIO is finished: taking over %s.", directory)
        return result

    def _search(self, batches: CheckedBatches) -> NIOResult:
        trainer, preemption = self._trainer, self._trainer.preemption
        seed_everything(self._config.seed)
        with NIOProgress(self._method.title, self._tell_cost(), trainer._hides_progress) as progress:
            given = (self._replica, batches, trainer.compute_nio_loss, self._config)
            watched: dict[str, Any] = {
                "on_iteration": progress.advance,
                "on_trial": progress.tell_trial,
                "should_stop": lambda: preemption is not None and preemption.requested,
            }
            if self._method is NIO:
                result = initialize(*given, **watched, collective=self._collective)
            else:
                result = run_baseline(self._method, self._options, *given, self._collective, **watched)
            progress.finish(result)
        return result

    def _save(self, result: NIOResult, task: Task) -> None:
        trainer = self._trainer
        with self._collective.together():
            if not trainer.args.should_save:
                return
            trainer.nio_state = describe_state(self._replica, result, task)
            if trainer.nio_args.nio_save_init:
                processor, describe = trainer.processing_class, trainer.describe
                save_initialised(self._replica, trainer.nio_state, trainer.nio_init_dir, processor, describe)

    def _tell_cost(self) -> float | None:
        """Say what the run may cost at most; returns that in training steps, None where it is not known."""
        config, method = self._config, self._method
        groups = len(find_tensors(self._replica, config.scaled_tensors, config.groups).groups) if method is NIO else 1
        cost = expected_cost(config, groups, method, self._options)
        if cost is not None and method.name != "none":
            message = "%s will cost %.0f training steps of %d samples at most."
            self._trainer._tell(logger, message, method.subject, cost, self._trainer.nio_args.nio_batch_size)
        return cost


def checked_batches(trainer: NIOTrainerMixin) -> CheckedBatches:
    """The report batches of NIO, then those that it searches on, prepared, with their labels checked."""
    return CheckedBatches(trainer.get_nio_dataloader(), classes_of_labels(trainer), trainer.prepare_nio_batch)
