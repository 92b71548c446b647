"""`nio-hf recipes`: list, show and copy the recipes that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="List, show and copy the recipes that come with the package.")

_Name = Annotated[str, typer.Argument(help="Name of a recipe, e.g. vit-tiny/digits/nio.", show_default=False)]


@app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """List the recipes with a line for each."""
    if context.invoked_subcommand is None:
        from nio_hf.catalog import accelerate_config_names, describe, recipe_names
        from nio_hf.console import print_results

        rows = [(name, describe(name)) for name in recipe_names()]
        configs = ", ".join(accelerate_config_names())
        print_results("", {"": (("", ""), rows)}, [f"For `nio-hf train --config_file NAME`: {configs}"], {})


@app.command()
def show(
    name: _Name,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Include the settings of its base, without comments.")
    ] = False,
) -> None:
    """Print a recipe."""
    from nio_hf.catalog import find_recipe
    from nio_hf.console import exit_status

    def action() -> int:
        from nio_hf.recipe.layering import read_layers, settings_yaml

        path = find_recipe(name)
        settings = read_layers(path)
        text = settings_yaml(settings) if resolved else path.read_text(encoding="utf-8")
        typer.echo(text, nl=False)
        return 0

    raise typer.Exit(exit_status(action))


@app.command()
def copy(
    name: _Name,
    destination: Annotated[
        Path | None, typer.Argument(help="File or folder; by default MODEL-DATASET-VARIANT.yaml here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Copy a recipe, to change it."""
    from nio_hf.catalog import copy_recipe
    from nio_hf.console import exit_status

    def action() -> int:
        typer.echo(f"Copied to {copy_recipe(name, destination, replace=force)}")
        return 0

    raise typer.Exit(exit_status(action))
