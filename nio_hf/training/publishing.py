"""A Trainer whose pushes to the Hub say what the model is, and cannot end a training."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from nio_hf.core import Collective, NIOResult
from nio_hf.errors import ConfigError, HubError, Problem, one_line
from nio_hf.hub import (
    CARD_NAME,
    WAITS,
    Destination,
    card_on_hub,
    check_destination,
    push_command,
    push_errors,
    push_folder,
    tried,
    write_card,
)
from nio_hf.report import draw_run
from nio_hf.report.run import Facts
from nio_hf.training.background import Background
from nio_hf.training.checkpoints import INIT_DIR_NAME, STATE_NAME, State
from nio_hf.training.durable import DurableTrainerMixin
from nio_hf.training.run_folder import (
    changed_arguments,
    describe_run,
    has_weights,
    read_run,
    shareable_files,
    training_seconds,
)

logger = logging.getLogger(__name__)

PLOTS_DIR_NAME = "plots"
_STAGING_DIR_NAME = "_nio_push"
_CLASSIFIERS = ("ForImageClassification", "ForSequenceClassification", "ForTokenClassification")
_ONLY_TO_RESUME = ("*.bin", "*.pt", "*.pth", "global_step*", "latest", "zero_to_fp32.py")
"""Files of a checkpoint that are no part of the model."""
_OF_A_RUN = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "trainer_state.json",
    "all_results.json",
    "nio_*.json",
    "nio_*.yaml",
    "plots/nio_*.png",
    "plots/training.png",
    "plots/inspection.png",
    "inspect/*",
)
"""Files that belong to a run: those of an earlier one would be taken for this one's."""
_ONE_MORE_TRY = (1.0,)
"""For a push in the middle of a training: the next checkpoint is another try."""


def publish(
    directory: Path,
    destination: Destination,
    *,
    message: str | None = None,
    license_id: str | None = None,
    tags: Sequence[str] = (),
    name: str | None = None,
    plots: bool = True,
    later: Path | None = None,
    waits: Sequence[float] = WAITS,
) -> CommitInfo:
    """Draw the plots of a model's folder, write its model card, and push it.

    Args:
        directory: of the model.
        destination: where to.
        message: of the commit; None for one that says what the model is.
        license_id: identifier of the model's licence on the Hub; None for the one that the card there has.
        tags: to add to the card.
        name: of the model; None for that of the repository.
        plots: whether to draw them.
        later: folder that `nio-hf push` would push later; None for `directory`.
        waits: seconds before each further try.

    Raises:
        CheckpointError: for a folder that is not of a run.
        HubError: where the push was refused, or failed to the last try.
        OutputError: where plots or card cannot be written.
    """
    run = read_run(directory, name or destination.repo_id)
    options = {"license": license_id, "tag": tags, "commit_message": message}
    command = push_command(later or directory, destination, **options)
    with push_errors(directory, destination, command):
        former = tried(lambda: card_on_hub(destination), destination.repo_id, waits)
    drawn = draw_run(run, directory / PLOTS_DIR_NAME) if plots else {}
    is_ours = write_card(run, directory, drawn, destination.repo_id, former, license_id=license_id, tags=tags)
    default = f"Trained for {run.steps} steps" if run.is_trained else "Initialised by NIO"
    return push_folder(
        directory,
        destination,
        message=message or default,
        leave_out=_ONLY_TO_RESUME if is_ours else (*_ONLY_TO_RESUME, CARD_NAME),
        replaced=shareable_files(directory),
        stale=_OF_A_RUN,
        later=command,
        waits=waits,
    )


class PublishingTrainerMixin(DurableTrainerMixin):
    """Describes each model that it saves, and pushes it with a card of what it is.

    Token, name and permission are checked when the Trainer is made. A push in the middle of a training that fails is
    a warning; the training goes on. Before the training, `push_to_hub` pushes the initialised checkpoint.
    """

    nio_result: NIOResult | None
    hub_model_id: Any
    push_in_progress: Any
    _nio_state: State | None = None
    _started_from: str | None = None
    _former_seconds = 0.0
    _session_began: float | None = None
    _session_ended: float | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._background = Background("nio-push")
        super().__init__(*args, **kwargs)

    @property
    def nio_init_dir(self) -> Path:
        """Where the initialised checkpoint is saved; each trial of a hyper-parameter search has its own."""
        return self._run_dir / INIT_DIR_NAME

    @property
    def recipe_text(self) -> str | None:
        """The recipe as YAML, saved with the model; None without one. Override it where there is one."""
        return None

    def run_facts(self) -> Facts:
        """What is saved with the model of how it came about. Override it where more is known, e.g. of the data."""
        model: Any = self._nio_model()
        config = model.config if isinstance(model, PreTrainedModel) else None
        info = getattr(self.train_dataset, "info", None)
        return Facts(
            model=type(model).__name__,
            model_type=None if config is None else config.model_type,
            parameters=sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters()),
            classes=config.num_labels if config is not None and type(model).__name__.endswith(_CLASSIFIERS) else None,
            dataset=getattr(info, "dataset_name", None),
            dataset_config=getattr(info, "config_name", None),
            arguments=changed_arguments(self.args),
            processes=self.args.world_size,
            device=self.args.device.type,
            started_from=self._started_from,
        )

    def _describe(self, directory: Path) -> None:
        describe_run(directory, self.run_facts(), self.recipe_text, self._nio_state, self.training_seconds)

    def _destination(self, token: str | None = None, private: bool | None = None) -> Destination:
        name = self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        return Destination(
            repo_id=name,
            token=self.args.hub_token if token is None else token,
            private=self.args.hub_private_repo if private is None else private,
            revision=self.args.hub_revision,
        )

    def _initialised_folder(self) -> Path:
        if not (self.nio_init_dir / STATE_NAME).is_file():
            fix = "Set nio_save_init=True, or push after the training"
            raise ConfigError(Problem("push_to_hub", "the initialised checkpoint is not saved", fix))
        return self.nio_init_dir

    def _push_checkpoint(self, directory: Path) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self._pushes and not self.args.hub_always_push:
            return
        if not has_weights(directory):
            logger.warning("%s is not pushed: it holds the model in shards. The trained model will be.", directory)
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # Rotation may delete the checkpoint while it is pushed.
        staged = self._run_dir / _STAGING_DIR_NAME / directory.name
        try:
            _link_files(directory, staged)
        except OSError as error:
            logger.warning("%s is not pushed; the training goes on. %s", directory, one_line(error))
            return
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch or 0)}"
        self._in_background(lambda: self._push_staged(staged, directory, f"Training in progress, {when}"))

    def _push_staged(self, staged: Path, checkpoint: Path, message: str) -> None:
        """Push a checkpoint that was set aside; what fails is a warning."""
        destination = self._destination()
        try:
            # Without plots: matplotlib is not made for several threads.
            publish(staged, destination, message=message, plots=False, later=checkpoint, waits=_ONE_MORE_TRY)
            if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                keeps_all = self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS
                push_folder(
                    staged,
                    destination,
                    message=f"{message}, checkpoint",
                    path_in_repo=checkpoint.name if keeps_all else "last-checkpoint",
                    leave_out=(CARD_NAME,),
                    replaced=shareable_files(staged),
                    later=push_command(checkpoint, destination),
                    waits=_ONE_MORE_TRY,
                )
        except Exception as error:
            # Nobody asks the thread how it went.
            logger.warning("%s is not pushed; the training goes on. %s", checkpoint, one_line(error))
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            with contextlib.suppress(OSError):
                staged.parent.rmdir()

    @property
    def _pushes(self) -> list[Future[Any]]:
        """The pushes that are not done."""
        in_progress = getattr(self, "push_in_progress", None)
        return [] if in_progress is None else [job for job in in_progress.jobs if not job.done()]

    def _in_background(self, action: Callable[[], Any]) -> Future[Any]:
        future = self._background.submit(action)
        jobs: Any = [*self._pushes, future]
        self.push_in_progress = PushInProgress(jobs)
        return future

    def _tags(self, tags: str | Sequence[str] | None) -> list[str]:
        """Tags that were given, and those that callbacks gave the model."""
        given = [tags] if isinstance(tags, str) else list(tags or [])
        return [*given, *(getattr(self.model, "model_tags", None) or [])]

    @property
    def training_seconds(self) -> float | None:
        """Seconds of all sessions of this training so far, those before it was resumed included; None before it."""
        if self._session_began is None:
            return None
        now = time.perf_counter() if self._session_ended is None else self._session_ended
        return self._former_seconds + now - self._session_began

    # What follows overrides Trainer.

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Check that the repository can be pushed to; it is made by the first push.

        Args:
            token: None for `hub_token`.
            private: None for `hub_private_repo`.

        Raises:
            HubError: for a name, token or permission that will not do.
        """
        collective = Collective.current()
        with collective.together():
            repo_id = None
            if self.is_world_process_zero():
                repo_id = check_destination(self._destination(token, private)).repo_id
        self.hub_model_id = collective.broadcast_object(repo_id)
        if not hasattr(self, "push_in_progress"):
            self.push_in_progress = None

    def create_model_card(  # type: ignore[override]
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the model card of what was saved in `output_dir`, unless the one there is your own.

        Args:
            language: ignored, like all further arguments of Trainer, which describe fine-tuned models.
            license: identifier of the licence on the Hub.
            tags: to add.
            model_name: None for the name of `output_dir`.
            **kwargs: ignored.
        """
        if self.is_world_process_zero():
            directory = Path(str(self.args.output_dir))
            run = read_run(directory, model_name)
            plots = draw_run(run, directory / PLOTS_DIR_NAME)
            write_card(run, directory, plots, license_id=license, tags=self._tags(tags))

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push the model with its card: once it is trained `output_dir`, before that the initialised checkpoint.

        Args:
            commit_message: None for one that says what the model is.
            blocking: return when the push is done.
            token: None for `hub_token`, or the one that is logged in.
            revision: branch; None for `hub_revision`.
            private: whether a repository that is made is private; None for `hub_private_repo`.
            **kwargs: `license`, `tags` and `model_name`, as in `create_model_card`.

        Returns:
            [`~huggingface_hub.CommitInfo`], or the future of it; None on other processes than the first.

        Raises:
            HubError: where the push was refused, or failed to the last try; what was saved is whole, and the message
                has the command that pushes it later.
            ConfigError: before a training, with `nio_save_init=False`.
        """
        if self.model is None:
            raise ConfigError(Problem("push_to_hub", "a search leaves no model", "Train the best trial, then push it"))
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None or token is not None or private is not None:
            self.init_hf_repo(token=token, private=private)
        untrained = self.state.global_step == 0 and self.nio_result is not None
        if not untrained:
            self.save_model(_internal_call=True)
            self.save_state()
        if not self.is_world_process_zero():
            return None
        destination = self._destination(token, private)
        if revision is not None:
            destination = dataclasses.replace(destination, revision=revision)
        directory = self._initialised_folder() if untrained else Path(str(self.args.output_dir))
        self._finish_current_push()

        def push() -> CommitInfo:
            return publish(
                directory,
                destination,
                message=commit_message,
                license_id=kwargs.get("license"),
                tags=self._tags(kwargs.get("tags")),
                name=kwargs.get("model_name"),
            )

        if blocking:
            return push()
        future = self._in_background(push)
        future.add_done_callback(_log_failure)
        # An atexit function is too late: huggingface_hub cannot start its threads then.
        getattr(threading, "_register_atexit", atexit.register)(futures.wait, [future])
        return future

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer; a push that fails is an error in the log, for the model is saved."""
        super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            try:
                self.push_to_hub()
            except HubError as error:
                logger.error("The model is saved, but not pushed. %s", error)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        checkpoint = resume_from_checkpoint
        self._former_seconds = 0.0 if checkpoint is None else training_seconds(Path(checkpoint))
        self._session_began, self._session_ended = time.perf_counter(), None
        if self.is_world_process_zero() and not self._pushes:
            # What was set aside by a training that was killed.
            shutil.rmtree(self._run_dir / _STAGING_DIR_NAME, ignore_errors=True)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._session_ended = time.perf_counter()
        return super()._finalize_training(*args, **kwargs)

    def _finish_current_push(self) -> None:
        # A scheduler that ends the training does not wait for the Hub.
        if not self._stopped:
            super()._finish_current_push()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        self._describe(Path(str(output_dir or self.args.output_dir)))


def _log_failure(future: Future[Any]) -> None:
    """Say what went wrong with a push that nobody may ask about."""
    if not future.cancelled() and future.exception() is not None:
        logger.error("The model is saved, but not pushed. %s", future.exception())


def _link_files(source: Path, target: Path) -> None:
    """Put the files of a folder into another one, as links to the same data where the disk can."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
