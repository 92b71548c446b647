"""How far trials are, on the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from nio_hf.metrics import LOSS, Metric
from nio_hf.trials.results import Outcome
from nio_hf.trials.run import Run


class Progress:
    """A bar over all trials, and a table of what is known so far; lines where there is no terminal.

    Args:
        title: what is being done.
        total: number of trials at the least, until [`Progress.expect`] says more.
        table: gives the table.
        metric: that the trials are judged by.
    """

    def __init__(self, title: str, total: int, table: Callable[[], Table], metric: Metric) -> None:
        self._table = table
        self._metric = metric
        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._bar_of_all = self._bar.add_task(title, total=total)
        self._active: dict[Run, float] = {}
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=2)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def expect(self, total: int) -> None:
        """Set the number of trials, once it is known."""
        self._bar.update(self._bar_of_all, total=total)

    def advance(self, known: int) -> None:
        """Count trials that ended before."""
        if known:
            self._bar.advance(self._bar_of_all, known)
            self.say(f"{known} runs are known already.")

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def started(self, run: Run) -> None:
        """A run has started."""
        self._active[run] = time.perf_counter()

    def ended(self, run: Run, outcome: Outcome) -> None:
        """A run has ended."""
        self._active.pop(run, None)
        self._bar.advance(self._bar_of_all)
        if not self._console.is_terminal:
            done, total = (int(value or 0) for value in (self._bar.tasks[0].completed, self._bar.tasks[0].total))
            self.say(f"[{done}/{total}] {run.name}: {_result(outcome, self._metric)} ({outcome.seconds:.0f} s)")

    def _render(self) -> Group:
        now = time.perf_counter()
        # The terminal is refreshed by a thread of its own.
        active = dict(self._active)
        running = ", ".join(f"{run.name} ({now - started:.0f} s)" for run, started in active.items())
        return Group(self._table(), f"Running: {running}", self._bar)


def _result(outcome: Outcome, metric: Metric) -> str:
    if outcome.value is None:
        return f"failed, {outcome.error}"
    loss = "" if metric.key == LOSS.key else f", loss {outcome.eval_loss:.4f}"
    cost = f", initialisation {outcome.cost_steps:.1f} steps" if outcome.cost_steps else ""
    return f"{metric.name} {metric.text(outcome.value)}{loss}{cost}"
