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
from typing import Any, cast

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from nio_hf.core import Collective
from nio_hf.durable.mixin import TrainerMixin
from nio_hf.errors import ConfigError, HubError, Problem, one_line
from nio_hf.extras import how_to_install, missing_modules
from nio_hf.hub.access import Destination, check_destination
from nio_hf.hub.background import Background
from nio_hf.hub.card import CARD_NAME, card_on_hub, write_card
from nio_hf.hub.push import WAITS, push_command, push_errors, push_folder, tried
from nio_hf.hub.run_folder import (
    changed_arguments,
    describe_run,
    has_weights,
    read_run,
    shareable_files,
    training_seconds,
)
from nio_hf.report import draw_run
from nio_hf.report.run import Facts, Run

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
    drawn = _drawn(run, directory) if plots else {}
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


class HubTrainerMixin(TrainerMixin):
    """Describes each model that it saves, and pushes it with a card of what it is.

    Token, name and permission are checked when the Trainer is made. A push in the middle of a training that fails is
    a warning; the training goes on.

    Attributes:
        started_from: name on the Hub of what the model was loaded from, where that is to be told.
    """

    hub_model_id: Any
    push_in_progress: Any
    started_from: str | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._background = Background("nio-push")
        super().__init__(*args, **kwargs)
        self._sessions: tuple[float, float | None, float | None] = (0.0, None, None)
        self.add_callback(_HubCallback(self))

    @property
    def recipe_text(self) -> str | None:
        """The recipe as YAML, saved with the model; None without one. Override it where there is one."""
        return None

    def run_facts(self) -> Facts:
        """What is saved with the model of how it came about. Override it where more is known, e.g. of the data."""
        model: Any = self.unwrapped_model
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
            started_from=self.started_from,
        )

    def describe(self, directory: Path) -> None:
        """Write beside a model how it came about."""
        describe_run(directory, self.run_facts(), self.recipe_text, self.training_seconds)

    @property
    def training_seconds(self) -> float | None:
        """Seconds of all sessions of this training so far, those before it was resumed included; None before it."""
        former, began, ended = self._sessions
        return None if began is None else former + (time.perf_counter() if ended is None else ended) - began

    def _destination(self, token: str | None = None, private: bool | None = None) -> Destination:
        name = self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        return Destination(
            repo_id=name,
            token=self.args.hub_token if token is None else token,
            private=self.args.hub_private_repo if private is None else private,
            revision=self.args.hub_revision,
        )

    def folder_to_push(self) -> Path:
        """The folder that `push_to_hub` pushes. Override it for a model that is in another one than `output_dir`."""
        return Path(str(self.args.output_dir))

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
        staged = directory.parent / _STAGING_DIR_NAME / directory.name
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

    # What follows overrides Trainer; _push_from_checkpoint is private, see nio_hf.private

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

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the card of the model as it is now into `output_dir`, unless the one there is your own.

        Args:
            language: of the model.
            license: identifier of the licence on the Hub.
            tags: to add.
            model_name: None for the name of `output_dir`.
            finetuned_from: name of the model that this one was fine-tuned from.
            tasks: identifiers of tasks; the first one counts.
            dataset_tags: names of data sets on the Hub.
            dataset: names of data sets; the first one counts.
            dataset_args: of the data sets; the first one counts.
        """
        if self.is_world_process_zero():
            directory = Path(str(self.args.output_dir))
            directory.mkdir(parents=True, exist_ok=True)
            self.describe(directory)
            run = read_run(directory, model_name, self.state)
            if dataset is not None:
                facts = dataclasses.replace(run.facts, dataset=_first(dataset), dataset_config=_first(dataset_args))
                run = dataclasses.replace(run, facts=facts)
            plots = _drawn(run, directory)
            given = _metadata(language, finetuned_from, tasks, dataset_tags)
            write_card(run, directory, plots, license_id=license, tags=self._tags(tags), given=given)

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push the model with its card, see `folder_to_push`.

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
            ConfigError: where there is no model, or none that is saved.
        """
        if self.model is None:
            raise ConfigError(Problem("push_to_hub", "a search leaves no model", "Train the best trial, then push it"))
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None or token is not None or private is not None:
            self.init_hf_repo(token=token, private=private)
        directory = self.folder_to_push()
        if directory == Path(str(self.args.output_dir)):
            self.save_model(_internal_call=True)
            self.save_state()
        if not self.is_world_process_zero():
            return None
        destination = self._destination(token, private)
        if revision is not None:
            destination = dataclasses.replace(destination, revision=revision)
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
        """As in Trainer, described; a push that fails is an error in the log, for the model is saved."""
        super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:
            HubTrainerMixin.describe(self, Path(str(output_dir or self.args.output_dir)))
        if self.args.push_to_hub and not _internal_call:
            try:
                self.push_to_hub()
            except HubError as error:
                logger.error("The model is saved, but not pushed. %s", error)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not here: a checkpoint is pushed when callbacks have written theirs into it."""


class _HubCallback(TrainerCallback):
    """Pushes each checkpoint, and keeps the time."""

    def __init__(self, trainer: HubTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin a session, and remove what a training that was killed had set aside."""
        resumed_from = self._trainer.resumed_from
        former = 0.0 if resumed_from is None else training_seconds(resumed_from)
        self._trainer._sessions = (former, time.perf_counter(), None)
        if state.is_world_process_zero and not self._trainer._pushes:
            shutil.rmtree(Path(str(args.output_dir)) / _STAGING_DIR_NAME, ignore_errors=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Push the checkpoint of this step."""
        directory = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.push_to_hub and directory.is_dir():
            self._trainer._push_checkpoint(directory)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End a session; one that SIGTERM has stopped does not wait for the Hub."""
        former, began, _ = self._trainer._sessions
        self._trainer._sessions = (former, began, time.perf_counter())
        preemption = self._trainer.preemption
        if preemption is not None and preemption.stopped:
            self._trainer.push_in_progress = None


def _drawn(run: Run, directory: Path) -> dict[str, Path]:
    """The plots of a run, in its folder; none without the extra `report`, which is said."""
    if missing_modules("report"):
        logger.info("The card has no plots. %s", how_to_install("report"))
        return {}
    return draw_run(run, directory / PLOTS_DIR_NAME)


def _metadata(
    language: str | None, base_model: str | None, tasks: str | list[str] | None, datasets: str | list[str] | None
) -> dict[str, Any]:
    """The fields of the metadata of a card that the arguments of `create_model_card` give."""
    names = [datasets] if isinstance(datasets, str) else datasets
    languages = None if language is None else [language]
    fields = {"language": languages, "base_model": base_model, "pipeline_tag": _first(tasks), "datasets": names}
    return {name: value for name, value in fields.items() if value}


def _first(names: str | list[str] | None) -> str | None:
    return names[0] if isinstance(names, list) and names else cast(str | None, names or None)


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
