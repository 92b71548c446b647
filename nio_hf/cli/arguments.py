"""The arguments that commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from nio_hf.recipe.catalog import DEFAULT_RECIPE

Private = Annotated[
    bool, typer.Option("--private", help="With --push_to_hub USER/NAME: make the repository a private one.")
]
RecipeArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [--KEY VALUE]...",
        help=f"A YAML file or the name of a recipe that comes with the package (default: {DEFAULT_RECIPE}), and "
        "settings that override it, e.g. --learning_rate 1e-3, or --push_to_hub USER/NAME.",
        show_default=False,
    ),
]
