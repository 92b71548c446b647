"""`nio-hf compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nio_hf.cli.arguments import RecipeArguments, option_in

_option = option_in("The comparison")


def compare(
    arguments: RecipeArguments = None,
    arms: Annotated[str, _option("arms", "What is compared, by name, between commas.")] = "no_warmup,warmup,nio",
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
    verdict: Annotated[
        bool,
        _option("verdict/--no_verdict", "Whether to judge the arms on fresh seeds."),
    ] = True,
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
    from nio_hf.comparison.command import run_comparison

    raise typer.Exit(
        run_comparison(
            arguments or [],
            arms=arms,
            definitions=arm or [],
            learning_rates=learning_rates,
            warmup_ratios=warmup_ratios,
            seeds=seeds,
            verdict_seeds=0 if not verdict else seeds if verdict_seeds is None else verdict_seeds,
            steps=steps,
            budget=budget,
            jobs=jobs,
            diagnostics=diagnostics,
            output_dir=output_dir,
        )
    )
