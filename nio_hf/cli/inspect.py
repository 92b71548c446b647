"""`nio-hf inspect`."""

from __future__ import annotations

from typing import Annotated

import typer


def inspect(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL_OR_RECIPE [--KEY VALUE]...",
            help="A folder with a model, USER/NAME on the Hub, or a recipe whose model is built anew; and settings "
            "that override the recipe, or the one that the model was saved with.",
            show_default=False,
        ),
    ],
) -> None:
    """Measure GradCosine, gradient norm and loss by layer: where the gradients of sub-batches agree."""
    from nio_hf.inspection import run_inspection

    raise typer.Exit(run_inspection(arguments))
