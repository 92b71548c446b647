"""Arguments that the commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from nio_hf.catalog import DEFAULT_RECIPE


def option_in(panel: str | None) -> Callable[..., Any]:
    """Return a function that makes an option in a panel of the help, from its name, text and least value."""

    def option(name: str, text: str, least: int | None = None) -> Any:
        names = dict.fromkeys((f"--{name}",) if "/" in name else (f"--{name}", f"--{name.replace('_', '-')}"))
        return typer.Option(*names, help=text, rich_help_panel=panel, min=least)

    return option


option = option_in(None)
Private = Annotated[bool, option("private", "With --push_to_hub USER/NAME: make the repository a private one.")]
RecipeArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [--KEY VALUE]...",
        help=f"A YAML file or the name of a recipe that comes with the package (default: {DEFAULT_RECIPE}), and "
        "settings that override it, e.g. --learning_rate 1e-3, or --push_to_hub USER/NAME.",
        show_default=False,
    ),
]
