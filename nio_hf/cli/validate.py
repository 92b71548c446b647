"""`nio-hf validate`."""

from __future__ import annotations

from typing import Annotated

import typer


def validate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [--KEY VALUE]...",
            help="YAML files or names of recipes, and settings that override all of them.",
            show_default=False,
        ),
    ],
    data: Annotated[
        bool, typer.Option("--data", help="Also load a batch and run NIO shortly; nothing is kept.")
    ] = False,
    num_processes: Annotated[
        int | None,
        typer.Option(
            "--num_processes", "--num-processes", min=1, help="Check for so many processes, not for this one."
        ),
    ] = None,
) -> None:
    """Check keys, types and consistency of recipes; every problem is reported."""
    from nio_hf.validate import run_validation

    raise typer.Exit(run_validation(arguments, with_data=data, num_processes=num_processes))
