"""The runs of a study in one directory: outcomes of those that have ended, processes for those that are missing."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import filelock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from nio_hf.catalog import recipe_name
from nio_hf.durable.preemption import sigterm_handled_by
from nio_hf.errors import ConfigError, NIOError, Problem, RecipeError
from nio_hf.files import output_errors
from nio_hf.hub.run_folder import shareable
from nio_hf.metrics import LOSS
from nio_hf.recipe.loading import Recipe
from nio_hf.study.costs import most_steps
from nio_hf.study.plan import QUIET, Plan, Run
from nio_hf.study.results import Outcome, Results
from nio_hf.study.worker import Order, carry_out

TERMINATED = 128 + signal.SIGTERM
"""Exit status of a command that SIGTERM ended, as in shells."""
_FOLDER = ".nio-trial-"
"""Beginning of the names of temporary folders."""
_LOG_LINES = 12


class RunError(NIOError, RuntimeError):
    """A run that ended without an outcome."""


@dataclasses.dataclass
class Study:
    """A plan for a recipe, and the directory of its runs.

    Attributes:
        recipe: Recipe of all runs, before the settings of the arms.
        plan: Plan of the study.
        directory: Directory of the results.
        decided: Settings that differ from run to run.
        task: Further values that all runs share. Results with another task are refused.
        jobs: Number of runs at a time.
        diagnostics: Whether the runs measure their first steps.
        recipes: {name of an arm: its recipe}.
        outcomes: {run: outcome} of the runs that [`complete`] was called with.

    Raises:
        RecipeError: The problems of all arms, such as an initialisation that may take the whole budget.
    """

    recipe: Recipe
    plan: Plan
    directory: Path
    decided: Iterable[str]
    task: Mapping[str, Any]
    jobs: int = 1
    diagnostics: bool = False
    recipes: dict[str, Recipe] = dataclasses.field(init=False, default_factory=dict)
    outcomes: dict[Run, Outcome] = dataclasses.field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        problems: list[Problem] = []
        for arm in self.plan.arms:
            where = f"arm {arm.name}"
            try:
                self.recipes[arm.name] = own = self.recipe.replace({**QUIET, **arm.settings}, where)
                problems += _cost_problems(own, self.plan, where)
            except NIOError as error:
                for problem in error.problems:
                    place = problem.where if problem.where.startswith(where) else f"{where}, {problem.where}"
                    problems.append(dataclasses.replace(problem, where=place))
        if problems:
            raise RecipeError(*problems)

    @property
    def runs(self) -> Path:
        """Folder of the logs of the runs."""
        return self.directory / "runs"

    @property
    def title(self) -> str:
        """Name of the recipe."""
        return recipe_name(self.recipe.path)

    @contextlib.contextmanager
    def opened(self, total: int) -> Iterator[None]:
        """Lock the directory and read its results. Temporary folders are removed, even if SIGTERM ends the context.

        Args:
            total: Least number of runs, for the progress bar.

        Raises:
            RecipeError: Results of another study in the directory, or another process at work in it.
        """

        def end(number: int, frame: object) -> None:
            raise SystemExit(TERMINATED)

        with output_errors(self.directory, trained=False):
            self.runs.mkdir(parents=True, exist_ok=True)
        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        with sigterm_handled_by(end), _locked(self.directory), self._bar:
            self._results = Results(self.directory, self._task())
            self._all = self._bar.add_task("", total=total)
            _remove_folders(self.runs)
            try:
                yield
            finally:
                _remove_folders(self.runs)

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def complete(self, runs: Sequence[Run], total: int | None = None) -> None:
        """Take the outcomes of runs from the results, and carry out the runs that are missing.

        Args:
            runs: Runs.
            total: Number of all runs of the study; None if it is not known yet.

        Raises:
            RunError: A run that ended without an outcome.
        """
        known = {run: self._results.get(run, self.plan.arm(run.arm)) for run in runs if run not in self.outcomes}
        recalled = {run: outcome for run, outcome in known.items() if outcome is not None}
        self.outcomes |= recalled
        self._bar.update(self._all, total=total, advance=len(recalled))
        if recalled:
            self.say(f"{len(recalled)} runs are known already.")
        unseen = [run for run, o in recalled.items() if self.diagnostics and not o.diagnostics and o.error is None]
        if unseen:
            self.say(f"{len(unseen)} of them have no diagnostics. Give another --output_dir to measure all runs.")
        execute([run for run in runs if run not in self.outcomes], self.order_for, self.jobs, self._note)

    def _note(self, run: Run, outcome: Outcome) -> None:
        """Save an outcome and print it."""
        self._results.add(run, self.plan.arm(run.arm), outcome)
        self.outcomes[run] = outcome
        self._bar.advance(self._all)
        metric, task = self.recipe.metric, self._bar.tasks[0]
        said = f"failed, {outcome.error}"
        if outcome.value is not None:
            loss = "" if metric.key == LOSS.key else f", loss {outcome.eval_loss:.4f}"
            cost = f", initialisation {outcome.cost_steps:.1f} steps" if outcome.cost_steps else ""
            said = f"{metric.name} {metric.text(outcome.value)}{loss}{cost}"
        self.say(f"[{task.completed:.0f}/{task.total:.0f}] {run.name}: {said} ({outcome.seconds:.0f} s)")

    def order_for(self, run: Run) -> Order:
        """Return the order for the process of a run."""
        with output_errors(self.runs, trained=False):
            folder = tempfile.mkdtemp(prefix=_FOLDER, dir=self.runs)
        recipe = self.recipes[run.arm].replace({**self.plan.settings(run), "output_dir": folder}, f"run {run.name}")
        threads = None if self.jobs == 1 else max((os.cpu_count() or 1) // self.jobs, 1)
        share = self.plan.budget_of(run) / self.plan.steps
        return Order(recipe, self.runs / f"{run.name}.log", share, self.diagnostics, threads)

    def _task(self) -> dict[str, Any]:
        """Return the values that all runs share: the settings of the recipe and the defaults of NIO.

        Absolute paths are cut down to their names, so that results can move to another machine.
        """
        own = {*self.decided, *QUIET, "output_dir"}
        settings = {key: value for key, value in vars(self.recipe.training).items() if key.startswith("nio_")}
        settings |= {key: setting.value for key, setting in self.recipe.settings.items()}
        shared = {key: shareable(value) for key, value in settings.items() if key not in own}
        return {"recipe": self.title, **self.task, "settings": shared}


def execute(
    pending: Sequence[Run], order_for: Callable[[Run], Order], jobs: int, on_outcome: Callable[[Run, Outcome], None]
) -> None:
    """Carry out runs in their order, `jobs` at a time, each in a process of its own, which ends with its parent.

    An error stops the other runs.

    Raises:
        RecipeError: Settings that a run cannot work with.
        RunError: A run that ended without an outcome.
    """
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    # Processes start from one that has imported everything, where the platform can fork.
    context: Any = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        context.set_forkserver_preload([carry_out.__module__])
    waiting = list(reversed(pending))
    active: dict[Connection, tuple[BaseProcess, Run, Order]] = {}
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop()
                order = order_for(run)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=carry_out, args=(order, sender))
                process.start()
                sender.close()
                active[receiver] = (process, run, order)
            failures: list[NIOError] = []
            for receiver in cast(list[Connection], wait(list(active))):
                process, run, order = active.pop(receiver)
                try:
                    on_outcome(run, _receive(receiver, process, run, order))
                except (RunError, RecipeError) as error:
                    failures.append(error)
                shutil.rmtree(str(order.recipe.training.output_dir), ignore_errors=True)
            if failures:
                raise failures[0]
    finally:
        for process, _, _ in active.values():
            process.kill()
        for process, _, _ in active.values():
            process.join()


def _receive(receiver: Connection, process: BaseProcess, run: Run, order: Order) -> Outcome:
    """Return the outcome that a process has sent.

    Raises:
        RecipeError: Settings that the run cannot work with.
        RunError: Another error of the run, or the last lines of its log if it has sent nothing.
    """
    where = f"run {run.name}"
    with receiver:
        try:
            sent = receiver.recv()
        except EOFError:
            sent = None
    process.join()
    if isinstance(sent, NIOError):
        kind = RecipeError if isinstance(sent, ConfigError | RecipeError) else RunError
        raise kind(*(dataclasses.replace(problem, where=f"{where}, {problem.where}") for problem in sent.problems))
    if sent is None:
        lines: list[str] = []
        with contextlib.suppress(OSError):
            lines = order.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = "".join(f"\n    {line}" for line in lines[-_LOG_LINES:])
        found = f"ended with status {process.exitcode} and without a result{tail}"
        go_on = "The same command goes on with the remaining runs; other settings need another --output_dir"
        raise RunError(Problem(where, found, f"See {order.log_file}. {go_on}"))
    return cast(Outcome, sent)


def _remove_folders(directory: Path) -> None:
    for folder in directory.glob(f"{_FOLDER}*"):
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock a directory against a second process.

    Raises:
        RecipeError: Another process at work in the directory.
    """
    with output_errors(directory / ".lock", trained=False):
        try:
            lock = filelock.FileLock(directory / ".lock").acquire(timeout=0)
        except filelock.Timeout as error:
            fix = "Wait for it, or give another --output_dir"
            raise RecipeError(Problem(str(directory), "another process is at work in it", fix)) from error
    with lock:
        yield


def _cost_problems(recipe: Recipe, plan: Plan, where: str) -> Iterator[Problem]:
    """Yield the problem of an initialisation that may take the whole budget of a run."""
    most, steps = most_steps(recipe.training) or 0.0, plan.probe_steps or plan.steps
    if math.ceil(most * steps / plan.steps) >= steps:
        found = f"{plan.steps:,}, where the initialisation takes up to {most:,.0f} training steps"
        found += f"; its share of a probe of {steps} leaves nothing" if plan.probe_steps else ""
        fix = "Give more steps, or lower nio_report_batches or nio_batch_size"
        yield Problem(f"{where}, --steps", found, fix)
