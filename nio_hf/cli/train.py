"""`nio-hf train`."""

from __future__ import annotations

import typer

from nio_hf.cli.arguments import RecipeArguments


def train(arguments: RecipeArguments = None) -> None:
    """Initialise with NIO, train, evaluate and save, as a recipe says."""
    from nio_hf.train import run_recipe
    from nio_hf.train import train as train_recipe

    raise typer.Exit(run_recipe(train_recipe, arguments or []))
