"""How far a comparison is, on the terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from nio_hf.comparison.plan import Plan, Run
from nio_hf.comparison.results import Outcome


class Progress:
    """A bar over all runs, and a table of the arms with the accuracies so far; lines where there is no terminal.

    Args:
        plan: of the comparison.
        known: outcomes of the runs that ended before, by which the table is filled as others end.
    """

    def __init__(self, plan: Plan, known: Mapping[Run, Outcome]) -> None:
        self._plan = plan
        self._known = known
        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("Comparing"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        total = len(plan.grid()) + plan.verdict_seeds * len(plan.arms)
        self._task = self._bar.add_task("runs", total=total, completed=len(known))
        self._active: dict[Run, float] = {}
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=2)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        elif self._known:
            self._console.print(f"{len(self._known)} runs are known already.", highlight=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def announce(self, runs: Sequence[Run]) -> None:
        """Count the runs that are known already."""
        known = sum(run in self._known for run in runs)
        self._bar.advance(self._task, known)

    def started(self, run: Run) -> None:
        """A run has started."""
        self._active[run] = time.perf_counter()

    def ended(self, run: Run, outcome: Outcome) -> None:
        """A run has ended."""
        self._active.pop(run, None)
        self._bar.advance(self._task)
        if not self._console.is_terminal:
            done, total = (int(value or 0) for value in (self._bar.tasks[0].completed, self._bar.tasks[0].total))
            line = f"[{done}/{total}] {run.name}: {_result(outcome)} ({outcome.seconds:.0f} s)"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        table.add_column("accuracy (%)")
        for rate in self._plan.learning_rates:
            table.add_column(f"{rate:g}", justify="right")
        for arm in self._plan.arms:
            table.add_row(arm.name, *(self._cell(arm.name, rate) for rate in self._plan.learning_rates))
        names = ", ".join(run.name for run in self._active)
        return Group(table, f"Running: {names}", self._bar)

    def _cell(self, arm: str, rate: float) -> str:
        own = [
            outcome
            for run, outcome in self._known.items()
            if run.arm == arm and run.learning_rate == rate and run.stage == "selection"
        ]
        values = [outcome.accuracy for outcome in own if outcome.accuracy is not None]
        mean = f"{sum(values) / len(values):.1f}" if values else "-"
        return f"{mean} ({len(own)})"


def _result(outcome: Outcome) -> str:
    if outcome.accuracy is None:
        return f"failed, {outcome.error}"
    cost = f", initialisation {outcome.cost_steps:.1f} steps" if outcome.cost_steps else ""
    return f"{outcome.accuracy:.2f}%{cost}"
