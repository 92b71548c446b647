"""`nio-hf report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An output_dir, or a checkpoint.")],
    output: Annotated[Path | None, typer.Option("--output", help="File to write; by default DIR/report.html.")] = None,
) -> None:
    """Write one page with all tables and plots of a run, which needs no network."""
    from nio_hf.console import exit_status
    from nio_hf.hub.run_folder import read_run
    from nio_hf.report.page import write_page

    def action() -> int:
        path = directory / "report.html" if output is None else output
        write_page(read_run(directory), path)
        typer.echo(f"Report: {path}")
        return 0

    raise typer.Exit(exit_status(action, interrupted=""))
