"""The commands of studies: `nio-hf compare` and `nio-hf tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nio_hf.cli.arguments import RecipeArguments, option_in

_option = option_in("The study")
_VerdictSeeds = Annotated[int | None, _option("verdict_seeds", "Fresh seeds to judge by; default: as many as --seeds.")]
_Steps = Annotated[int | None, _option("steps", "Training steps of a whole training, initialisation included.")]
_Jobs = Annotated[int, _option("jobs", "Trainings at a time.", 1)]
_OutputDir = Annotated[
    Path | None, _option("output_dir", "Where to write; default: beside the output_dir of the recipe.")
]


def _seeds_of_verdict(verdict: bool, seeds: int, verdict_seeds: int | None) -> int:
    """Number of fresh seeds that judge; 0 without a verdict."""
    return 0 if not verdict else seeds if verdict_seeds is None else verdict_seeds


def compare(
    arguments: RecipeArguments = None,
    arms: Annotated[
        str, _option("arms", "Names of the arms, i.e. the ways to start, between commas.")
    ] = "no_warmup,warmup,nio",
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
    verdict_seeds: _VerdictSeeds = None,
    verdict: Annotated[bool, _option("verdict/--no_verdict", "Whether to judge the arms on fresh seeds.")] = True,
    steps: _Steps = None,
    budget: Annotated[
        int | None,
        _option("budget", "Training steps of all runs together; a comparison that may take more is refused.", 1),
    ] = None,
    jobs: _Jobs = 1,
    diagnostics: Annotated[bool, _option("diagnostics", "Measure what moves in the first steps.")] = False,
    output_dir: _OutputDir = None,
) -> None:
    """Compare ways to start a training with warmup: choose on a grid of learning rates, and judge on fresh seeds."""
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
            _seeds_of_verdict(verdict, seeds, verdict_seeds),
            line.steps(steps),
            budget,
        )
        line.add(study.plan_problems(plan))
        line.add(study.recipe_problems(line.recipe))
        line.check()
        directory = line.directory(output_dir, "compare")
        task = {"steps": plan.steps}
        findings = study.compare(Study(line.recipe, plan, directory, CONTROLLED, task, jobs, diagnostics))
        study.make_report(findings).publish(directory, "comparison")
        return 0

    raise typer.Exit(exit_status(command, interrupted=GO_ON))


def tune(
    arguments: RecipeArguments = None,
    groups: Annotated[str, _option("groups", "Values of nio_groups to try, in words.")] = "additive,model",
    strengths: Annotated[str, _option("strengths", "Values of nio_strength to try.")] = "0.5,0.75,1",
    seeds: Annotated[int, _option("seeds", "Rounds, each on a seed of its own; each halves the candidates.")] = 3,
    verdict_seeds: _VerdictSeeds = None,
    verdict: Annotated[
        bool, _option("verdict/--no_verdict", "Whether to compare the choice with the recipe's own settings.")
    ] = True,
    probe_steps: Annotated[int, _option("probe_steps", "Training steps of a probe.")] = 50,
    steps: _Steps = None,
    budget: Annotated[
        int | None,
        _option("budget", "Training steps, initialisations included, beyond which no round of probes is begun.", 1),
    ] = None,
    jobs: _Jobs = 1,
    output_dir: _OutputDir = None,
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
            _seeds_of_verdict(verdict, seeds, verdict_seeds),
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
