"""Several runs at a time, each in a process of its own, which ends with its parent."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

from nio_hf.errors import NIOError, Problem, RecipeError
from nio_hf.trials.results import Outcome
from nio_hf.trials.run import Run
from nio_hf.trials.worker import Order, carry_out

_PRELOADED = ["nio_hf.trials.worker"]
_LOG_LINES = 12
_GO_ON = "The same command goes on with what is left; other settings need another --output_dir"


class RunError(NIOError, RuntimeError):
    """A run that ended without an outcome."""


def execute(
    pending: Sequence[Run],
    order_for: Callable[[Run], Order],
    jobs: int,
    on_outcome: Callable[[Run, Outcome], None],
    on_start: Callable[[Run], None] = lambda run: None,
) -> None:
    """Carry out runs, in their order, `jobs` at a time.

    Args:
        pending: what to run.
        order_for: what the process of a run is to do.
        jobs: processes at a time.
        on_outcome: called with each outcome as it comes.
        on_start: called with each run as it starts.

    Raises:
        RecipeError: for settings that a run cannot work with; the others are stopped, here and below.
        RunError: for a run that ended without an outcome.
    """
    context = _context()
    waiting = list(reversed(pending))
    with _stopped_at_the_end() as active:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop()
                order = order_for(run)
                order.outcome_file.unlink(missing_ok=True)
                process = context.Process(target=carry_out, args=(order,))
                process.start()
                active[process.sentinel] = (process, run, order)
                on_start(run)
            failures: list[NIOError] = []
            for sentinel in wait(list(active)):
                process, run, order = active.pop(cast(int, sentinel))
                process.join()
                try:
                    on_outcome(run, _outcome_of(process, run, order))
                except (RunError, RecipeError) as error:
                    failures.append(error)
            if failures:
                raise failures[0]


def default_threads(jobs: int) -> int | None:
    """Threads of each process: an equal share of the cores; None for torch's choice where there is one process."""
    return None if jobs == 1 else max((os.cpu_count() or 1) // jobs, 1)


def _context() -> Any:
    """Processes that start from one which has imported everything, where the platform can fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


@contextlib.contextmanager
def _stopped_at_the_end() -> Iterator[dict[int, tuple[BaseProcess, Run, Order]]]:
    """Processes that are active, none at first; those that are so at the end are killed."""
    active: dict[int, tuple[BaseProcess, Run, Order]] = {}
    try:
        yield active
    finally:
        for process, _, _ in active.values():
            process.kill()
        for process, _, _ in active.values():
            process.join()


def _outcome_of(process: BaseProcess, run: Run, order: Order) -> Outcome:
    """What a process that has ended wrote.

    Raises:
        RecipeError: with what is wrong with its settings.
        RunError: with what else went wrong, or with the last lines of its log where it wrote nothing.
    """
    where = f"run {run.name}"
    try:
        fields = json.loads(order.outcome_file.read_text(encoding="utf-8"))
    except OSError as error:
        found = f"ended with status {process.exitcode} and without a result\n{_tail(order.log_file)}"
        fix = f"See {order.log_file}. {_GO_ON}"
        raise RunError(Problem(where, found, fix)) from error
    if "problems" in fields:
        problems = [Problem(f"{where}, {place}", found, fix) for place, found, fix in fields["problems"]]
        raise (RecipeError if fields["is_usage"] else RunError)(*problems)
    return Outcome.from_dict(fields)


def _tail(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in lines[-_LOG_LINES:])
