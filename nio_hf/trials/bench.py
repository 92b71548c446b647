"""Trials of one recipe in one directory: those that have ended are known, those that are missing are carried out."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from nio_hf.errors import NIOError, Problem, RecipeError
from nio_hf.files import output_errors
from nio_hf.hub.run_folder import shareable
from nio_hf.recipe.catalog import recipe_name
from nio_hf.recipe.loading import Recipe, load_recipe
from nio_hf.recipe.strict_yaml import with_values
from nio_hf.trials.costs import most_steps
from nio_hf.trials.progress import Progress
from nio_hf.trials.results import Outcome, Results, locked
from nio_hf.trials.run import Run, Trial
from nio_hf.trials.schedule import default_threads, execute
from nio_hf.trials.worker import Order, remove_folders

QUIET = {
    "report_to": "none",
    "push_to_hub": False,
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "nio_save_init": False,
    "nio_save_steps": 0,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "disable_tqdm": True,
    "enable_jit_checkpoint": False,
}
"""Settings of every trial: it only trains and is evaluated at the end."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where and how the trials of a recipe are carried out.

    Attributes:
        recipe: name or file.
        overrides: settings that all trials share, as command line options.
        directory: to write into.
        jobs: trials at a time.
        diagnostics: whether to look at the first steps.
    """

    recipe: str
    overrides: tuple[str, ...]
    directory: Path
    jobs: int = 1
    diagnostics: bool = False

    def load(self) -> Recipe:
        """The recipe that all trials share.

        Raises:
            RecipeError: for what is wrong with it.
        """
        return load_recipe(self.recipe, self.overrides)

    @property
    def runs(self) -> Path:
        """Folder of the outcomes and logs of the runs."""
        return self.directory / "runs"

    def order_for(self, trial: Trial) -> Order:
        """What the process of a trial is to do."""
        with output_errors(self.runs, trained=False):
            self.runs.mkdir(parents=True, exist_ok=True)
        return Order(
            recipe=self.recipe,
            overrides=tuple(self._overrides(trial)),
            outcome_file=self.runs / f"{trial.run.name}.json",
            log_file=self.runs / f"{trial.run.name}.log",
            threads=default_threads(self.jobs),
            diagnostics=self.diagnostics,
            cost_share=trial.cost_share,
        )

    def check(self, trials: Iterable[Trial]) -> None:
        """Find out before the first trial whether the recipe of every arm can be read, and its initialisation afforded.

        Raises:
            RecipeError: lists what is wrong with each arm.
        """
        problems: list[Problem] = []
        for name, trial in {trial.arm.name: trial for trial in trials}.items():
            try:
                problems += _unaffordable(load_recipe(self.recipe, self._overrides(trial)), trial)
            except NIOError as error:
                problems += [dataclasses.replace(p, where=f"arm {name}, {p.where}") for p in error.problems]
        if problems:
            raise RecipeError(*problems)

    def _overrides(self, trial: Trial) -> list[str]:
        """The settings of a trial, as command line options."""
        return with_values(self.overrides, {**QUIET, **trial.settings})


class Trials:
    """The trials in the directory of a bench, which is locked meanwhile.

    Args:
        bench: where they are.
        recipe: that they share.
        decided: settings that are different from trial to trial.
        task: what else all trials have in common: results of another task are not those of this one.

    Attributes:
        outcomes: of the runs that were asked for so far.

    Raises:
        RecipeError: for results of something else in the directory, or another process at work in it.
    """

    def __init__(self, bench: Bench, recipe: Recipe, decided: Iterable[str], **task: Any) -> None:
        self._bench = bench
        self._task = {"recipe": recipe_name(recipe.path), **task, "settings": _shared_settings(recipe, decided)}
        self.outcomes: dict[Run, Outcome] = {}

    def __enter__(self) -> Trials:
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self._bench.directory))
            self._results = Results(self._bench.directory, self._task)
            stack.callback(remove_folders, self._bench.runs)
            remove_folders(self._bench.runs)
            self._locks = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._locks.__exit__(kind, error, trace)

    def recall(self, trials: Iterable[Trial]) -> int:
        """Take those that have ended from the results; returns how many of them were not taken before."""
        before = len(self.outcomes)
        for trial in trials:
            outcome = self._results.get(trial.run, trial.arm)
            if outcome is not None:
                self.outcomes[trial.run] = outcome
        return len(self.outcomes) - before

    def complete(self, trials: Sequence[Trial], progress: Progress) -> None:
        """Carry out those that are missing.

        Raises:
            RunError: for a run that ended without an outcome.
        """
        progress.advance(self.recall(trials))
        unseen = [trial.run for trial in trials if trial.run in self.outcomes and self._is_unseen(trial.run)]
        if unseen:
            progress.say(
                f"{len(unseen)} of them were not looked at: for --diagnostics of all give another --output_dir."
            )
        by_run = {trial.run: trial for trial in trials}

        def on_outcome(run: Run, outcome: Outcome) -> None:
            self._results.add(run, by_run[run].arm, outcome)
            self.outcomes[run] = outcome
            progress.ended(run, outcome)

        pending = [trial.run for trial in trials if trial.run not in self.outcomes]
        execute(
            pending,
            lambda run: self._bench.order_for(by_run[run]),
            self._bench.jobs,
            on_outcome,
            progress.started,
        )

    def _is_unseen(self, run: Run) -> bool:
        """Whether a run has no diagnostics, which are asked for."""
        outcome = self.outcomes[run]
        return self._bench.diagnostics and not outcome.diagnostics and outcome.error is None


def _unaffordable(recipe: Recipe, trial: Trial) -> Iterator[Problem]:
    """The problem of an initialisation that may take the whole budget."""
    most = most_steps(recipe.training) or 0.0
    if trial.cost_share == 1 and math.ceil(most) >= trial.steps:
        found = f"{trial.steps}, where the initialisation takes up to {most:,.0f} training steps"
        fix = "Give more steps, or lower nio_report_batches or nio_batch_size"
        yield Problem(f"arm {trial.arm.name}, --steps", found, fix)


def _shared_settings(recipe: Recipe, decided: Iterable[str]) -> dict[str, Any]:
    """The settings of all trials: what the recipe says, and what it leaves to the defaults of NIO.

    Results can be moved, to another machine or into a repository: of absolute paths they keep the names.
    """
    own = {*decided, *QUIET, "output_dir"}
    given = {key: setting.value for key, setting in recipe.settings.items()}
    defaults = {key: value for key, value in vars(recipe.training).items() if key.startswith("nio_")}
    return {key: shareable(value) for key, value in {**defaults, **given}.items() if key not in own}
