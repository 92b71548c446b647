"""`nio-hf compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nio_hf.cli.arguments import RecipeArguments, option_in

_option = option_in("The comparison")


def compare(
    arguments: RecipeArguments = None,
    arms: Annotated[str, _option("arms", "Names of the arms to compare, between commas.")] = "no_warmup,warmup,nio",
    arm: Annotated[
        list[str] | None,
        _option("arm", "A further arm: NAME=ARM,key=value,... a known arm with other settings; may be repeated."),
    ] = None,
    learning_rates: Annotated[
        str | None,
        _option("learning_rates", "Peak learning rates between commas; default: half to four times the recipe's."),
    ] = None,
    warmup_ratios: Annotated[
        str, _option("warmup_ratios", "Lengths of warmup to choose from, as shares of the steps.")
    ] = "0.1",
    seeds: Annotated[int, _option("seeds", "Seeds to choose learning rate and warmup by.")] = 3,
    verdict_seeds: Annotated[
        int | None, _option("verdict_seeds", "Fresh seeds to judge by; default: as many as --seeds.")
    ] = None,
    verdict: Annotated[bool, _option("verdict/--no_verdict", "Whether to judge the arms on fresh seeds.")] = True,
    steps: Annotated[int | None, _option("steps", "Training steps of a run, initialisation included.")] = None,
    budget: Annotated[
        int | None,
        _option("budget", "Training steps of all runs together; a comparison that may take more is refused.", 1),
    ] = None,
    jobs: Annotated[int, _option("jobs", "Runs at a time.", 1)] = 1,
    diagnostics: Annotated[bool, _option("diagnostics", "Look at what moves in the first steps.")] = False,
    output_dir: Annotated[
        Path | None, _option("output_dir", "Where to write; default: that of the recipe + -compare.")
    ] = None,
) -> None:
    """Does it replace warmup? Train with and without on a grid of learning rates, and judge on fresh seeds."""
    from nio_hf.console import exit_status
    from nio_hf.study import compare as study
    from nio_hf.study.arms import ARMS, CONTROLLED, choose_arms
    from nio_hf.study.options import GO_ON, Options
    from nio_hf.study.plan import Plan
    from nio_hf.study.runner import Study

    def command() -> int:
        line = Options(arguments or [], CONTROLLED)
        rates = study.default_rates(line.recipe) if learning_rates is None else learning_rates
        plan = Plan(
            line.attempt(lambda: choose_arms(arms.split(","), arm or []), tuple(ARMS.values())),
            line.numbers("--learning_rates", rates, "5e-4,1e-3"),
            line.numbers("--warmup_ratios", warmup_ratios, "0.05,0.1"),
            seeds,
            0 if not verdict else seeds if verdict_seeds is None else verdict_seeds,
            line.steps(steps),
            budget,
        )
        line.add(study.plan_problems(plan))
        line.check()
        directory = line.directory(output_dir, "compare")
        task = {"steps": plan.steps}
        findings = study.compare(Study(line.recipe, plan, directory, CONTROLLED, task, jobs, diagnostics))
        study.make_report(findings).publish(directory, "comparison")
        return 0

    raise typer.Exit(exit_status(command, interrupted=GO_ON))
