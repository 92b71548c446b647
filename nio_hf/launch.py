"""`accelerate launch` around a training, for the launch options of `nio-hf train`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate.commands.config.config_args import default_config_file

from nio_hf.catalog import find_accelerate_config
from nio_hf.console import STATUS_FILE
from nio_hf.errors import Problem, RecipeError
from nio_hf.recipe.loading import load_recipe

_FORWARDED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
"""Windows has the first two, and no groups of processes."""


def launch_command(options: Mapping[str, str], arguments: Sequence[str]) -> list[str]:
    """Return the command line of `accelerate launch -m nio_hf.train`.

    Args:
        options: Options of `accelerate launch` by name; `config_file` may name one that comes with the package.
        arguments: Recipe and overrides. They stand behind the module, where `accelerate launch` ignores them, so
            `--gradient_accumulation_steps` always belongs to the recipe.

    Raises:
        RecipeError: A configuration file that does not exist.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet"]
    for name, value in options.items():
        command += [f"--{name}", str(find_accelerate_config(value)) if name == "config_file" else value]
    return [*command, "-m", "nio_hf.train", *arguments]


def launch(options: Mapping[str, str], arguments: Sequence[str]) -> int:
    """Run `accelerate launch` and return the exit status of the training; signals reach all of its processes.

    Raises:
        RecipeError: A configuration file that does not exist, several processes where `accelerate launch` would run
            one without a warning, or a recipe that does not validate.
    """
    command, processes = launch_command(options, arguments), options.get("num_processes", "1")
    configured = "config_file" in options or Path(default_config_file).is_file()
    if processes != "1" and not configured and not torch.accelerator.is_available():
        found = f"{processes} without a GPU: accelerate would run one process"
        raise RecipeError(Problem("num_processes", found, "Add --config_file multi_cpu"))
    load_recipe(arguments[0], arguments[1:], world_size=int(processes))
    receivers: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: object) -> None:
        for process in receivers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number) if hasattr(os, "killpg") else process.send_signal(number)

    with tempfile.TemporaryDirectory() as folder:
        status_file = Path(folder) / "status"
        environment = {**os.environ, STATUS_FILE: str(status_file)}
        former = {number: signal.signal(number, forward) for number in _FORWARDED}
        try:
            # A session of its own lets a signal reach both the launcher and the training.
            with subprocess.Popen(command, env=environment, start_new_session=True) as process:
                receivers.append(process)
                status = process.wait()
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
        own = int(status_file.read_text(encoding="ascii")) if status_file.is_file() else 0
    if status != 0 and own != 0:
        return own
    # As in shells: 128 and the number of the signal.
    return status if status >= 0 else 128 - status
