"""A Trainer whose pushes carry a model card, and cannot end a training."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
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
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from nio_hf.core import Collective
from nio_hf.durable import TrainerMixin
from nio_hf.errors import ConfigError, HubError, Problem, one_line
from nio_hf.extras import how_to_install, missing_modules
from nio_hf.hub import push, run_folder
from nio_hf.hub.card import write_card
from nio_hf.report import draw_run
from nio_hf.report.run import Facts, Run

logger = logging.getLogger(__name__)

PLOTS_DIR_NAME = "plots"
_STAGING_DIR_NAME = "_nio_push"
_CLASSIFIERS = ("ForImageClassification", "ForSequenceClassification", "ForTokenClassification")
_NOT_PUSHED = "The model is saved, but not pushed."
_ONE_MORE_TRY = (1.0,)
"""Waits of a push during a training: the next checkpoint is another attempt."""


def publish(
    directory: Path,
    destination: push.Destination,
    *,
    message: str | None = None,
    license_id: str | None = None,
    tags: Sequence[str] = (),
    name: str | None = None,
    plots: bool = True,
    later: Path | None = None,
    waits: Sequence[float] = push.WAITS,
) -> CommitInfo:
    """Draw the plots of a run, write its model card, and push the folder of its model as [`push_folder`] does.

    Args:
        directory: Folder of the model.
        destination: Repository to push to.
        message: Message of the commit; None for one that describes the model.
        license_id: Licence; None for the licence of the card on the Hub.
        tags: Further tags of the card.
        name: Name of the model in the card; None for the name of the repository.
        plots: Whether to draw the plots.
        later: Folder that the command in an error pushes; None for the directory.
        waits: Seconds to wait before each further attempt.

    Raises:
        CheckpointError: A folder without a run.
        HubError: A push that was refused, or whose attempts all failed.
        OutputError: Plots or a card that cannot be written.
    """
    run = run_folder.read_run(directory, name or destination.repo_id)
    options = {"license": license_id, "tag": tags, "commit_message": message}
    command = push.push_command(later or directory, destination, **options)
    with push.push_errors(directory, destination, command):
        former = push.retry(lambda: push.card_on_hub(destination), destination.repo_id, waits)
    drawn = _draw(run, directory) if plots else {}
    is_ours = write_card(run, directory, drawn, destination.repo_id, former, license_id=license_id, tags=tags)
    message = message or (f"Trained for {run.steps} steps" if run.is_trained else "Initialised by NIO")
    return push.push_folder(directory, destination, message, with_card=is_ours, later=command, waits=waits)


class HubTrainerMixin(TrainerMixin):
    """Describes each model that it saves, and pushes it with a model card.

    Token, name and permission are checked when the Trainer is made. A push that fails during the training is a warning,
    and the training goes on.

    Attributes:
        started_from: Name on the Hub of the checkpoint that the model was loaded from; None if the card omits it.
    """

    hub_model_id: Any
    push_in_progress: Any = None
    started_from: str | None = None
    _sessions: tuple[float, float | None, float | None] = (0.0, None, None)
    """Seconds of former sessions, and the times at which this session began and ended."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_HubCallback(self))

    @property
    def recipe_text(self) -> str | None:
        """Recipe as YAML, which is saved with the model; None without one. Subclasses with a recipe override it."""
        return None

    def run_facts(self) -> Facts:
        """Return the facts of the run, which are saved with the model. Subclasses that know more override it."""
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
            arguments=run_folder.changed_arguments(self.args),
            processes=self.args.world_size,
            device=self.args.device.type,
            started_from=self.started_from,
        )

    def describe(self, directory: Path) -> None:
        """Write the description of the run beside a model."""
        run_folder.describe_run(directory, self.run_facts(), self.recipe_text, self.training_seconds)

    def folder_to_push(self) -> Path:
        """Return the folder that `push_to_hub` pushes. Subclasses whose model is outside `output_dir` override it."""
        return Path(str(self.args.output_dir))

    @property
    def training_seconds(self) -> float | None:
        """Seconds of all sessions of this training so far; None before the training."""
        former, began, ended = self._sessions
        return None if began is None else former + (time.perf_counter() if ended is None else ended) - began

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Check that the repository can be pushed to. The first push creates it.

        Raises:
            HubError: A name, token or permission that does not suffice.
        """
        collective, repo_id = Collective.current(), None
        with collective.together():
            if self.is_world_process_zero():
                repo_id = push.check_destination(self._destination(token, private)).repo_id
        self.hub_model_id = collective.broadcast_object(repo_id)

    def create_model_card(  # type: ignore[override]
        self, language: str | None = None, license: str | None = None, tags: Any = None, **given: Any
    ) -> None:
        """Write the model card of the present model into `output_dir`, unless the user has edited the card there.

        The arguments `model_name`, `finetuned_from`, `tasks`, `dataset_tags`, `dataset` and `dataset_args` are those of
        Trainer. The first task, data set and data set argument count.
        """
        if not self.is_world_process_zero():
            return
        directory = Path(str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        self.describe(directory)
        run = run_folder.read_run(directory, given.get("model_name"), self.state)
        task, dataset, config = (next(iter(_as_list(given.get(n))), None) for n in ("tasks", "dataset", "dataset_args"))
        if dataset is not None:
            facts = dataclasses.replace(run.facts, dataset=dataset, dataset_config=config)
            run = dataclasses.replace(run, facts=facts)
        fields = {
            "language": _as_list(language),
            "base_model": given.get("finetuned_from"),
            "pipeline_tag": task,
            "datasets": _as_list(given.get("dataset_tags")),
        }
        metadata = {name: value for name, value in fields.items() if value}
        plots = _draw(run, directory)
        write_card(run, directory, plots, license_id=license, tags=self._tags(tags), given=metadata)

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Push [`folder_to_push`] with a model card, as in Trainer.

        `license`, `tags` and `model_name` in `kwargs` go into the card.

        Returns:
            [`~huggingface_hub.CommitInfo`], or its future if `blocking` is false; None on all processes but the first.

        Raises:
            HubError: A push that was refused, or whose attempts all failed. The saved model is whole, and the message
                has the command that pushes it later.
            ConfigError: No model, or a model that is not saved.
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
        futures.wait(self._pushes)
        given: Any = {"license_id": kwargs.get("license"), "name": kwargs.get("model_name")}
        given |= {"message": commit_message, "tags": self._tags(kwargs.get("tags"))}
        push_now = functools.partial(publish, directory, self._destination(token, private, revision), **given)
        if blocking:
            return push_now()
        future = self._in_background(push_now, _NOT_PUSHED, logging.ERROR)
        # huggingface_hub starts threads, which is too late in an atexit function.
        getattr(threading, "_register_atexit", atexit.register)(futures.wait, [future])
        return future

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save and describe the model, as in Trainer. A push that fails is an error in the log: the model is saved."""
        super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:
            HubTrainerMixin.describe(self, Path(str(output_dir or self.args.output_dir)))
        if self.args.push_to_hub and not _internal_call:
            try:
                self.push_to_hub()
            except HubError as error:
                logger.error("%s %s", _NOT_PUSHED, error)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: [`_HubCallback`] pushes a checkpoint when all callbacks have written their files into it."""

    def _destination(self, token: str | None, private: bool | None, revision: str | None = None) -> push.Destination:
        args = self.args
        return push.Destination(
            repo_id=self.hub_model_id or args.hub_model_id or Path(str(args.output_dir)).absolute().name,
            token=args.hub_token if token is None else token,
            private=args.hub_private_repo if private is None else private,
            revision=args.hub_revision if revision is None else revision,
        )

    def _tags(self, tags: Any) -> list[str]:
        """Return the given tags and the tags that callbacks have added to the model."""
        return [*_as_list(tags), *(getattr(self.model, "model_tags", None) or [])]

    # Pushes of checkpoints

    @property
    def _pushes(self) -> list[Future[Any]]:
        """Pushes that are still going on."""
        return [] if self.push_in_progress is None else [job for job in self.push_in_progress.jobs if not job.done()]

    def _in_background(self, action: Callable[[], Any], complaint: str, level: int) -> Future[Any]:
        """Carry out an action after the present pushes. An error is logged, since nobody may ask the future."""
        future, before = Future[Any](), self._pushes

        def work() -> None:
            futures.wait(before)
            try:
                future.set_result(action())
            except BaseException as error:
                logger.log(level, "%s %s", complaint, one_line(error))
                future.set_exception(error)

        # The end of a process, even by Ctrl-C, would wait for an executor, as HfApi.run_as_future uses it.
        threading.Thread(target=work, name="nio-push", daemon=True).start()
        jobs: Any = [*before, future]
        self.push_in_progress = PushInProgress(jobs)
        return future

    def _push_checkpoint(self, directory: Path) -> None:
        """Push a copy of a checkpoint in the background: rotation may delete the checkpoint meanwhile."""
        args, is_busy = self.args, bool(self._pushes) and not self.args.hub_always_push
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END or is_busy:
            return
        if not run_folder.has_weights(directory):
            logger.warning("%s is not pushed: it holds the model in shards. The trained model will be.", directory)
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        by_steps = args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch or 0)}"
        message, complaint = f"Training in progress, {when}", f"{directory} is not pushed; the training goes on."
        staged = directory.parent / _STAGING_DIR_NAME / directory.name
        try:
            shutil.rmtree(staged, ignore_errors=True)
            shutil.copytree(directory, staged, copy_function=_link_or_copy)
        except OSError as error:
            logger.warning("%s %s", complaint, one_line(error))
            return
        self._in_background(lambda: self._push_staged(staged, directory, message), complaint, logging.WARNING)

    def _push_staged(self, staged: Path, checkpoint: Path, message: str) -> None:
        """Push the copy of a checkpoint, and delete the copy."""
        destination = self._destination(None, None)
        folders = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        folder = folders.get(HubStrategy(self.args.hub_strategy))
        try:
            # matplotlib is not made for several threads.
            publish(staged, destination, message=message, plots=False, later=checkpoint, waits=_ONE_MORE_TRY)
            if folder is not None:
                message, later = f"{message}, checkpoint", push.push_command(checkpoint, destination)
                options: Any = {"with_card": False, "later": later, "waits": _ONE_MORE_TRY}
                push.push_folder(staged, destination, message, path_in_repo=folder, **options)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            with contextlib.suppress(OSError):
                staged.parent.rmdir()


class _HubCallback(TrainerCallback):
    """Pushes each checkpoint, and measures the sessions."""

    def __init__(self, trainer: HubTrainerMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Begin a session, and remove the copies of a training that was killed."""
        resumed_from = self._trainer.resumed_from
        former = 0.0 if resumed_from is None else run_folder.training_seconds(resumed_from)
        self._trainer._sessions = (former, time.perf_counter(), None)
        if state.is_world_process_zero and not self._trainer._pushes:
            shutil.rmtree(Path(str(args.output_dir)) / _STAGING_DIR_NAME, ignore_errors=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Push the checkpoint of this step."""
        directory = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if args.push_to_hub and directory.is_dir():
            self._trainer._push_checkpoint(directory)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """End a session. A training that SIGTERM has stopped does not wait for the Hub."""
        former, began, _ = self._trainer._sessions
        self._trainer._sessions = (former, began, time.perf_counter())
        preemption = self._trainer.preemption
        if preemption is not None and preemption.stopped:
            self._trainer.push_in_progress = None


def _draw(run: Run, directory: Path) -> dict[str, Path]:
    """Draw the plots of a run into its folder; without the extra `report`, log that there are none."""
    if missing_modules("report"):
        logger.info("The card has no plots. %s", how_to_install("report"))
        return {}
    return draw_run(run, directory / PLOTS_DIR_NAME)


def _as_list(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
