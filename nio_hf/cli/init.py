"""`nio-hf init`."""

from __future__ import annotations

import typer

from nio_hf.cli.arguments import RecipeArguments


def init(arguments: RecipeArguments = None) -> None:
    """Initialise with NIO and save the initialised checkpoint, without training."""
    from nio_hf.train import initialise, run_recipe

    raise typer.Exit(run_recipe(initialise, arguments or []))
