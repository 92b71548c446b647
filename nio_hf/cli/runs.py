"""The commands of one run: `nio-hf train`, `init`, `validate`, `inspect`, `report` and `push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from nio_hf.cli.arguments import Private, RecipeArguments, option, option_in

_launch = option_in("Options of accelerate launch: with one of them, training runs in its processes")
_PRIVATE = ["--hub_private_repo", "true"]


def train(
    arguments: RecipeArguments = None,
    config_file: Annotated[
        str | None, _launch("config_file", "A configuration of accelerate, or the name of one in `recipes`.")
    ] = None,
    num_processes: Annotated[int | None, _launch("num_processes", "Number of processes on all machines.", 1)] = None,
    num_machines: Annotated[int | None, _launch("num_machines", "Number of machines.", 1)] = None,
    machine_rank: Annotated[int | None, _launch("machine_rank", "Number of this machine, from 0.", 0)] = None,
    main_process_ip: Annotated[str | None, _launch("main_process_ip", "Address of machine 0.")] = None,
    main_process_port: Annotated[int | None, _launch("main_process_port", "Port on machine 0.")] = None,
    gpu_ids: Annotated[str | None, _launch("gpu_ids", "GPUs of this machine, e.g. 0,1 or all.")] = None,
    private: Private = False,
) -> None:
    """Initialise with NIO, train, evaluate and save, as a recipe says."""
    given = {
        **{"config_file": config_file, "num_processes": num_processes, "num_machines": num_machines},
        **{"machine_rank": machine_rank, "main_process_ip": main_process_ip, "main_process_port": main_process_port},
        "gpu_ids": gpu_ids,
    }
    arguments = [*(arguments or []), *(_PRIVATE if private else [])]
    options = {name: str(value) for name, value in given.items() if value is not None}
    if options:
        from nio_hf.catalog import split_arguments
        from nio_hf.console import exit_status
        from nio_hf.launch import launch

        recipe, overrides = split_arguments(arguments)
        raise typer.Exit(exit_status(lambda: launch(options, [recipe, *overrides])))

    from nio_hf.train import run_recipe
    from nio_hf.train import train as train_recipe

    raise typer.Exit(run_recipe(train_recipe, arguments))


def init(
    arguments: RecipeArguments = None,
    device: Annotated[
        Literal["auto", "cpu"],
        option("device", "auto: an accelerator where there is one; cpu: for a model too large for it."),
    ] = "auto",
    private: Private = False,
) -> None:
    """Initialise with NIO and save the initialised checkpoint, without training."""
    from nio_hf.train import initialise, run_recipe

    on_cpu = ["--use_cpu", "true"] if device == "cpu" else []
    raise typer.Exit(run_recipe(initialise, [*(arguments or []), *on_cpu, *(_PRIVATE if private else [])]))


def validate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [--KEY VALUE]...",
            help="YAML files or names of recipes, and settings that override all of them.",
            show_default=False,
        ),
    ],
    data: Annotated[bool, option("data", "Also load a batch and run NIO shortly; nothing is kept.")] = False,
    num_processes: Annotated[
        int | None, option("num_processes", "Number of processes to check for; by default one.", 1)
    ] = None,
) -> None:
    """Check keys, types and consistency of recipes, and report every problem."""
    from nio_hf.validate import run_validation

    raise typer.Exit(run_validation(arguments, with_data=data, num_processes=num_processes))


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


def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An output_dir, or a checkpoint.")],
    output: Annotated[Path | None, option("output", "File to write; by default DIR/report.html.")] = None,
) -> None:
    """Write one page with all tables and plots of a run, which works without a network."""
    from nio_hf.console import exit_status
    from nio_hf.errors import OutputError, Problem
    from nio_hf.hub.run_folder import read_run
    from nio_hf.report.page import write_page

    def action() -> int:
        path = directory / "report.html" if output is None else output
        if path.is_dir():
            raise OutputError(Problem("--output", f"{path}, a folder", "Give a file"))
        write_page(read_run(directory), path)
        typer.echo(f"Report: {path}")
        return 0

    raise typer.Exit(exit_status(action, interrupted=""))


def push(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="An output_dir, a checkpoint, or an initialised checkpoint.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="Model repository, new or existing.")],
    private: Annotated[bool, option("private", "Make the repository private.")] = False,
    revision: Annotated[str | None, option("revision", "Branch to push to.")] = None,
    commit_message: Annotated[str | None, option("commit_message", "Default: a description of the model.")] = None,
    tag: Annotated[list[str] | None, option("tag", "Tag for the card; may be repeated.")] = None,
    license_id: Annotated[
        str | None, option("license", "Licence of the model, as the Hub names it, e.g. apache-2.0.")
    ] = None,
    token: Annotated[str | None, option("token", "Default: HF_TOKEN, or the token of `hf auth login`.")] = None,
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
