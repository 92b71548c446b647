"""`nio-hf init`."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from nio_hf.cli.arguments import Private, RecipeArguments


class Device(enum.StrEnum):
    """Where NIO computes."""

    AUTO = "auto"
    CPU = "cpu"


def init(
    arguments: RecipeArguments = None,
    device: Annotated[
        Device,
        typer.Option("--device", help="auto: an accelerator where there is one; cpu: for a model too large for it."),
    ] = Device.AUTO,
    private: Private = False,
) -> None:
    """Initialise with NIO and save the initialised checkpoint, without training."""
    from nio_hf.train import initialise, run_recipe

    on_cpu = ["--use_cpu", "true"] if device is Device.CPU else []
    hub = ["--hub_private_repo", "true"] if private else []
    raise typer.Exit(run_recipe(initialise, [*(arguments or []), *on_cpu, *hub]))
