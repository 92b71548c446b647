"""`nio-hf push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="An output_dir, a checkpoint, or an initialised checkpoint.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="Model repository, made where there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch to push to.")] = None,
    commit_message: Annotated[
        str | None, typer.Option("--commit_message", "--commit-message", help="Default: what the model is.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="Tag for the card; may be repeated.")] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", help="Licence of the model, as the Hub names it, e.g. apache-2.0.")
    ] = None,
    token: Annotated[
        str | None, typer.Option("--token", help="Default: HF_TOKEN, or the one of `hf auth login`.")
    ] = None,
) -> None:
    """Push a model with its card, plots and `nio_state.json` to the Hub."""
    from nio_hf.console import exit_status
    from nio_hf.hub import Destination, check_destination
    from nio_hf.hub.run_folder import model_folder
    from nio_hf.hub.trainer import publish

    def action() -> int:
        folder = model_folder(directory)
        asked = Destination(repo_id, token, private or None, revision)
        destination = check_destination(asked, fix="Then push again")
        commit = publish(folder, destination, message=commit_message, license_id=license_id, tags=tag or [])
        typer.echo(f"Pushed {folder} to {commit.repo_url}: {commit.commit_url}")
        return 0

    raise typer.Exit(exit_status(action, interrupted=""))
