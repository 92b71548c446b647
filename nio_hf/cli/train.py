"""`nio-hf train`."""

from __future__ import annotations

from typing import Annotated

import typer

from nio_hf.cli.arguments import Private, RecipeArguments

_PANEL = "Options of accelerate launch: with one of them, training runs in its processes"


def _launch_option(name: str, text: str, least: int | None = None) -> object:
    return typer.Option(f"--{name}", f"--{name.replace('_', '-')}", help=text, rich_help_panel=_PANEL, min=least)


def train(
    arguments: RecipeArguments = None,
    config_file: Annotated[
        str | None, _launch_option("config_file", "A configuration of accelerate, or the name of one in `recipes`.")
    ] = None,
    num_processes: Annotated[
        int | None, _launch_option("num_processes", "Processes on all machines together.", 1)
    ] = None,
    num_machines: Annotated[int | None, _launch_option("num_machines", "Machines.", 1)] = None,
    machine_rank: Annotated[int | None, _launch_option("machine_rank", "Number of this machine, from 0.", 0)] = None,
    main_process_ip: Annotated[str | None, _launch_option("main_process_ip", "Address of machine 0.")] = None,
    main_process_port: Annotated[int | None, _launch_option("main_process_port", "Port on machine 0.")] = None,
    gpu_ids: Annotated[str | None, _launch_option("gpu_ids", "GPUs of this machine, e.g. 0,1 or all.")] = None,
    private: Private = False,
) -> None:
    """Initialise with NIO, train, evaluate and save, as a recipe says."""
    given = {
        "config_file": config_file,
        "num_processes": num_processes,
        "num_machines": num_machines,
        "machine_rank": machine_rank,
        "main_process_ip": main_process_ip,
        "main_process_port": main_process_port,
        "gpu_ids": gpu_ids,
    }
    arguments = [*(arguments or []), *(["--hub_private_repo", "true"] if private else [])]
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
