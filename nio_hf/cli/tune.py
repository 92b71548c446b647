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
    from nio_hf.console import exit_status
    from nio_hf.study import tune as study
    from nio_hf.study.options import GO_ON, Options
    from nio_hf.study.plan import Plan
    from nio_hf.study.runner import Study

    def command() -> int:
        line = Options(arguments or [], study.CONTROLLED)
        words = [part.strip() for part in groups.split(",") if part.strip()]
        numbers = line.numbers("--strengths", strengths, "0.5,1")
        line.add(study.candidate_problems(line.recipe, words, numbers))
        plan = Plan(
            study.make_candidates(line.recipe, words, numbers),
            (line.recipe.training.learning_rate,),
            (),
            seeds,
            0 if not verdict else seeds if verdict_seeds is None else verdict_seeds,
            line.steps(steps),
            budget,
            probe_steps,
        )
        line.add(study.plan_problems(plan))
        line.check()
        directory = line.directory(output_dir, "tune")
        task = {"purpose": "tune", "steps": plan.steps, "probe_steps": probe_steps}
        search = study.tune(Study(line.recipe, plan, directory, study.CONTROLLED, task, jobs))
        study.make_report(search).publish(directory, "tuning")
        return 0

    raise typer.Exit(exit_status(command, interrupted=GO_ON))
