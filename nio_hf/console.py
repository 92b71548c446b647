"""What a command shows on the terminal: messages, errors and the summary of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nio_hf.core.collective import is_shared
from nio_hf.errors import ConfigError, NIOError, Preempted, RecipeError

FAILURE, USAGE_ERROR, PREEMPTED, INTERRUPTED = 1, 2, Preempted.STATUS, 130
"""Exit status of a run that failed, of settings that cannot work, of a run that SIGTERM ended after it had saved, and
of an interrupted run."""
STATUS_FILE = "NIO_HF_STATUS_FILE"
"""Environment variable: where a run writes its exit status, which launchers replace by their own."""


_GO_ON = "The same command with --resume_from_checkpoint auto goes on from what was saved, without it begins."


def exit_status(action: Callable[[], int], interrupted: str = _GO_ON) -> int:
    """Do what a command does, with our errors as messages on standard error.

    Args:
        action: what it does; returns the exit status.
        interrupted: how to go on after Ctrl-C.

    Returns:
        The exit status.
    """
    status = _status_of(action, interrupted)
    if STATUS_FILE in os.environ and _is_first("LOCAL_RANK"):
        Path(os.environ[STATUS_FILE]).write_text(str(status), encoding="ascii")
    return status


def _status_of(action: Callable[[], int], interrupted: str) -> int:
    errors = Console(stderr=True)
    _show_messages(errors)
    try:
        return action()
    except NIOError as error:
        is_usage = isinstance(error, ConfigError | RecipeError)
        # One message will do for what every process of a launch finds, or was told.
        if not (is_usage or is_shared(error)) or _is_first("RANK"):
            print_error(error, errors)
        return USAGE_ERROR if is_usage else FAILURE
    except Preempted:
        return PREEMPTED
    except KeyboardInterrupt:
        errors.print(f"Interrupted. {interrupted}".strip(), style="yellow", highlight=False)
        return INTERRUPTED


def _is_first(rank: str) -> bool:
    return os.environ.get(rank, "0") == "0"


def print_error(error: NIOError, console: Console) -> None:
    """Print one of our errors with its kind."""
    console.print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)


def print_recipes(descriptions: Mapping[str, str], accelerate_configs: Sequence[str]) -> None:
    """Print the names of recipes with a line on each, and the configurations of accelerate."""
    console = Console()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, description in descriptions.items():
        table.add_row(name, description)
    console.print(table)
    names = ", ".join(accelerate_configs)
    console.print(f"\nFor `nio-hf train --config_file NAME`: {names}", markup=False, highlight=False)


def print_run(
    title: str, rows: Sequence[tuple[str, str, str]], message: str | None, written: Mapping[str, Path | str]
) -> None:
    """Print a run: its table of (quantity, before, after), what NIO says of itself, and what was written."""
    console = Console()
    table = Table(title=title, title_justify="left")
    for name in ("", "before NIO", "after"):
        table.add_column(name, justify="right" if name else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if message is not None:
        console.print(f"Initialisation: {message}", markup=False, highlight=False)
    for what, path in written.items():
        console.print(f"{what}: {path}", markup=False, highlight=False, soft_wrap=True)


def print_inspection(
    title: str,
    rows: Sequence[tuple[str, str]],
    columns: Sequence[str],
    tables: Mapping[str, Sequence[Sequence[str]]],
    written: Mapping[str, Path],
) -> None:
    """Print an inspection: the whole gradient, its groups, and what was written.

    Args:
        title: names the model.
        rows: (quantity, value) of the whole gradient.
        columns: of the tables.
        tables: {what they are grouped by: rows}.
        written: {what: path}.
    """
    console = Console()
    whole = Table(title=title, title_justify="left", show_header=False)
    whole.add_column()
    whole.add_column(justify="right")
    for row in rows:
        whole.add_row(*row)
    console.print(whole)
    for name, members in tables.items():
        table = Table(title=name, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for member in members:
            table.add_row(*member)
        console.print(table)
    for what, path in written.items():
        console.print(f"{what}: {path}", markup=False, highlight=False, soft_wrap=True)


def print_comparison(
    title: str,
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]],
    words: Sequence[str],
    written: Mapping[str, Path],
) -> None:
    """Print a comparison: {name: (columns, rows)} of its tables, what it says in words, and what was written."""
    console = Console()
    console.print(title, style="bold", highlight=False)
    for name, (columns, rows) in tables.items():
        table = Table(title=name, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for sentence in words:
        console.print(sentence, markup=False, highlight=False)
    for what, path in written.items():
        console.print(f"{what}: {path}", markup=False, highlight=False, soft_wrap=True)


def print_validation(
    validations: Iterable[tuple[str, str, Sequence[str], NIOError | None]],
) -> int:
    """Print what was found about recipes, each as soon as it is known; returns the exit status.

    Args:
        validations: (name, summary, notes, error or None) of each.
    """
    console = Console()
    failures = 0
    for name, summary, notes, error in validations:
        if error is None:
            console.print(f"[green]ok[/green]  {name}  [dim]{summary}[/dim]", highlight=False, soft_wrap=True)
        else:
            failures += 1
            console.print(f"[red]no[/red]  {name}", highlight=False, soft_wrap=True)
            print_error(error, console)
        for note in notes:
            console.print(f"    Note: {note}.", style="yellow", highlight=False, soft_wrap=True)
    return FAILURE if failures else 0


def _show_messages(console: Console) -> None:
    """Show the messages of nio_hf from INFO on, of other processes than the first one the warnings only."""
    logger = logging.getLogger("nio_hf")
    logger.setLevel(logging.INFO if _is_first("RANK") else logging.WARNING)
    logger.propagate = False
    logger.handlers = [_MessageHandler(console)]


class _MessageHandler(logging.Handler):
    """Shows a message in one line, so that a command in it can be copied."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message behind its level."""
        style = {logging.WARNING: "yellow", logging.ERROR: "red"}.get(record.levelno)
        text = f"{record.levelname:<8} {record.getMessage()}"
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
