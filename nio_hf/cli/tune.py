"""`nio-hf tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nio_hf.cli.arguments import RecipeArguments, option_in

_option = option_in("The search")


def tune(
    arguments: RecipeArguments = None,
    groups: Annotated[str, _option("groups", "Values of nio_groups to try, in words.")] = "additive,model",
    strengths: Annotated[str, _option("strengths", "Values of nio_strength to try.")] = "0.5,0.75,1",
    seeds: Annotated[int, _option("seeds", "Rounds, each on a seed of its own; each halves the candidates.")] = 3,
    verdict_seeds: Annotated[
        int | None, _option("verdict_seeds", "Fresh seeds to judge by; default: as many as --seeds.")
    ] = None,
    verdict: Annotated[
        bool, _option("verdict/--no_verdict", "Whether to hold the choice against the recipe's own settings.")
    ] = True,
    probe_steps: Annotated[int, _option("probe_steps", "Training steps of a probe.")] = 50,
    steps: Annotated[int | None, _option("steps", "Steps of a whole training, initialisation included.")] = None,
    budget: Annotated[
        int | None,
        _option("budget", "Training steps, initialisations included, beyond which no round of probes is begun.", 1),
    ] = None,
    jobs: Annotated[int, _option("jobs", "Trainings at a time.", 1)] = 1,
    output_dir: Annotated[
        Path | None, _option("output_dir", "Where to write; default: that of the recipe + -tune.")
    ] = None,
) -> None:
    """Choose groups and strength of NIO by short trainings without warmup, and judge by whole ones."""
    from nio_hf.tuning.command import run_tuning

    raise typer.Exit(
        run_tuning(
            arguments or [],
            groups=groups,
            strengths=strengths,
            seeds=seeds,
            verdict_seeds=0 if not verdict else seeds if verdict_seeds is None else verdict_seeds,
            probe_steps=probe_steps,
            steps=steps,
            budget=budget,
            jobs=jobs,
            output_dir=output_dir,
        )
    )
