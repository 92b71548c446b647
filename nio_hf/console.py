"""Output of the commands on the terminal: messages, errors and results."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nio_hf.errors import ConfigError, NIOError, Preempted, RecipeError

FAILURE, USAGE_ERROR, PREEMPTED, INTERRUPTED = 1, 2, Preempted.STATUS, 130
"""Exit statuses: a run that failed, settings that cannot work, a run that SIGTERM ended after a save, Ctrl-C."""
STATUS_FILE = "NIO_HF_STATUS_FILE"
"""Environment variable with the path of a file for the exit status of a run, which launchers replace by their own."""
_GO_ON = "The same command with --resume_from_checkpoint auto goes on from the last save; without it, it begins."


def exit_status(action: Callable[[], int], interrupted: str = _GO_ON) -> int:
    """Carry out a command, print errors of this package to standard error, and return the exit status.

    Args:
        action: Function of the command, which returns an exit status.
        interrupted: Advice after Ctrl-C.
    """
    errors = Console(stderr=True)
    logger = logging.getLogger("nio_hf")
    logger.setLevel(logging.INFO if _is_first("RANK") else logging.WARNING)
    logger.propagate, logger.handlers = False, [_MessageHandler(errors)]
    try:
        status = action()
    except NIOError as error:
        from nio_hf.core.collective import is_shared  # torch, which `nio-hf recipes` does without

        is_usage = isinstance(error, ConfigError | RecipeError)
        # An error that every process of a launch finds or receives needs one message.
        if not (is_usage or is_shared(error)) or _is_first("RANK"):
            print_error(error, errors)
        status = USAGE_ERROR if is_usage else FAILURE
    except Preempted:
        status = PREEMPTED
    except KeyboardInterrupt:
        errors.print(f"Interrupted. {interrupted}".strip(), style="yellow", highlight=False)
        status = INTERRUPTED
    if STATUS_FILE in os.environ and _is_first("LOCAL_RANK"):
        Path(os.environ[STATUS_FILE]).write_text(str(status), encoding="ascii")
    return status


class _MessageHandler(logging.Handler):
    """Prints each message in one line, so that a command in it can be copied."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print the level and the message."""
        style = {logging.WARNING: "yellow", logging.ERROR: "red"}.get(record.levelno)
        text = f"{record.levelname:<8} {record.getMessage()}"
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _is_first(rank: str) -> bool:
    return os.environ.get(rank, "0") == "0"


def print_error(error: NIOError, console: Console) -> None:
    """Print an error of this package with its class."""
    console.print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)


def print_results(
    title: str,
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]],
    sentences: Sequence[str],
    files: Mapping[str, Path | str],
) -> None:
    """Print the results of a command.

    Args:
        title: Name of the run, model or comparison; empty for none.
        tables: {name: (columns, rows)}; a table whose columns have empty names has no header.
        sentences: Conclusions.
        files: {description: path or address} of everything that was written.
    """
    console = Console()
    if title:
        console.print(title, style="bold", markup=False, highlight=False)
    for name, (columns, rows) in tables.items():
        table = Table(title=name or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.show_header = any(columns)
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index and column else "left", no_wrap=not index)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for sentence in sentences:
        console.print(sentence, markup=False, highlight=False)
    for what, path in files.items():
        console.print(f"{what}: {path}", markup=False, highlight=False, soft_wrap=True)
