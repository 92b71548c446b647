"""Carry out a comparison: the runs that are missing, then what follows from all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nio_hf.comparison.analysis import cells, choose
from nio_hf.comparison.plan import CONTROLLED, Plan, Run
from nio_hf.comparison.progress import Progress
from nio_hf.comparison.report import Findings, write_report
from nio_hf.comparison.results import Outcome, Results, locked
from nio_hf.comparison.schedule import default_threads, execute
from nio_hf.comparison.worker import Order
from nio_hf.image_training.building import load_data
from nio_hf.recipe.catalog import recipe_name
from nio_hf.recipe.loading import Recipe, load_recipe
from nio_hf.recipe.strict_yaml import with_values

_QUIET = {
    "report_to": "none",
    "push_to_hub": False,
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "nio_save_init": False,
    "nio_save_steps": 0,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "disable_tqdm": True,
    "enable_jit_checkpoint": False,
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison of one recipe in one directory.

    Attributes:
        recipe: name or file.
        overrides: settings that all runs share, as command line options.
        plan: its runs.
        directory: to write into.
        jobs: runs at a time.
        diagnostics: whether to look at the first steps.
    """

    recipe: str
    overrides: tuple[str, ...]
    plan: Plan
    directory: Path
    jobs: int
    diagnostics: bool

    def order_for(self, run: Run) -> Order:
        """What the process of a run is to do."""
        folder = self.directory / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        settings = {**_QUIET, **run.settings(self.plan.arm(run.arm), self.plan.steps)}
        return Order(
            recipe=self.recipe,
            overrides=tuple(with_values(self.overrides, settings)),
            outcome_file=folder / f"{run.name}.json",
            log_file=folder / f"{run.name}.log",
            threads=default_threads(self.jobs),
            diagnostics=self.diagnostics,
        )


def compare(comparison: Comparison) -> tuple[Findings, dict[str, Path]]:
    """Carry out the runs that are missing, and write what follows from all of them.

    Returns:
        The findings, and {what: file} of what was written.

    Raises:
        RecipeError: for results of another comparison in the directory, or another one at work in it.
        RunError: for a run that ended without an outcome.
    """
    plan = comparison.plan
    recipe = load_recipe(comparison.recipe, comparison.overrides)
    title, chance = recipe_name(recipe.path), 100 / len(load_data(recipe).class_names)
    with locked(comparison.directory):
        results = Results(comparison.directory, _task(recipe, plan))
        known = _known(results, plan, plan.grid())

        def carry_out(runs: Sequence[Run], progress: Progress) -> None:
            def on_outcome(run: Run, outcome: Outcome) -> None:
                results.add(run, plan.arm(run.arm), outcome)
                known[run] = outcome
                progress.ended(run, outcome)

            pending = [run for run in runs if run not in known]
            execute(pending, comparison.order_for, comparison.jobs, on_outcome, progress.started)

        with Progress(plan, known) as progress:
            carry_out(plan.grid(), progress)
            if plan.verdict_seeds:
                runs = plan.verdict_runs(choose(cells(plan, known, chance)))
                known |= _known(results, plan, runs)
                progress.announce(runs)
                carry_out(runs, progress)
        findings = Findings.of(title, plan, known, chance)
        return findings, write_report(findings, comparison.directory)


def _task(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """What all runs have in common: results of another task are not those of this one."""
    decided = {*CONTROLLED, *_QUIET, "output_dir"}
    settings = {key: setting.value for key, setting in recipe.settings.items() if key not in decided}
    return {"recipe": recipe_name(recipe.path), "steps": plan.steps, "settings": settings}


def _known(results: Results, plan: Plan, runs: Sequence[Run]) -> dict[Run, Outcome]:
    outcomes = {run: results.get(run, plan.arm(run.arm)) for run in runs}
    return {run: outcome for run, outcome in outcomes.items() if outcome is not None}
