"""`nio-hf`: the commands."""

from __future__ import annotations

import sys

import typer

import nio_hf
from nio_hf.cli import recipes, runs, studies
from nio_hf.errors import MissingExtraError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Neural Initialization Optimization: an initialisation fitted to the model and the data.",
)
for _command in (runs.train, runs.init, runs.validate, runs.inspect, studies.compare, studies.tune):
    # Every `--key value` behind the recipe is an override.
    app.command(context_settings={"ignore_unknown_options": True})(_command)
app.command()(runs.report)
app.command()(runs.push)
app.add_typer(recipes.app, name="recipes")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nio-hf {nio_hf.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    """Options of the program itself."""


def main() -> None:
    """Entry point of `nio-hf`."""
    try:
        app()
    except MissingExtraError as error:
        sys.exit(f"{type(error).__name__}: {error}")
