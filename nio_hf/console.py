"""What a command shows on the terminal: messages, errors and the summary of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from nio_hf.errors import ConfigError, NIOError, RecipeError

FAILURE, USAGE_ERROR, INTERRUPTED = 1, 2, 130
"""Exit status of a run that failed, of settings that cannot work, and of an interrupted run."""


def run_command(action: Callable[[], None]) -> int:
    """Do what a command does, with our errors as messages on standard error; returns the exit status."""
    errors = Console(stderr=True)
    _show_messages(errors)
    try:
        action()
    except NIOError as error:
        errors.print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return USAGE_ERROR if isinstance(error, ConfigError | RecipeError) else FAILURE
    except KeyboardInterrupt:
        errors.print("Interrupted. What was saved before is complete; the same command starts anew.", style="yellow")
        return INTERRUPTED
    return 0


def print_run(
    title: str, rows: Sequence[tuple[str, str, str]], message: str | None, written: Mapping[str, Path]
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
        console.print(f"NIO: {message}", markup=False, highlight=False)
    for what, path in written.items():
        console.print(f"{what}: {path}", markup=False, highlight=False, soft_wrap=True)


def _show_messages(console: Console) -> None:
    """Show the messages of nio_hf from INFO on."""
    logger = logging.getLogger("nio_hf")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [RichHandler(console=console, show_time=False, show_path=False, markup=False)]
