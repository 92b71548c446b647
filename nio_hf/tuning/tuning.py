"""Carry out a search: rounds of probes, then the judgement of what was chosen."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Literal

from rich.table import Table

from nio_hf.catalog import recipe_name
from nio_hf.errors import Problem, RecipeError
from nio_hf.metrics import Metric
from nio_hf.recipe.loading import Recipe
from nio_hf.tasks import describe_data
from nio_hf.trials.bench import Bench, Trials
from nio_hf.trials.interval import Interval, paired_gain
from nio_hf.trials.progress import Progress
from nio_hf.trials.run import Arm
from nio_hf.trials.schedule import RunError
from nio_hf.tuning.plan import DECIDED, OWN, Outcomes, Plan, initialisation_cost

Word = Literal["better", "worse", "undecided"]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        title: of the recipe.
        plan: of the search.
        candidates: that were tried, the best first.
        outcomes: of all trainings.
        metric: that whole trainings are judged by.
        rounds: of probes that were carried out.
        difference: gain of the chosen settings over the recipe's own, paired over the fresh seeds; None where they are
            the same or were not judged.
    """

    title: str
    plan: Plan
    candidates: list[Arm]
    outcomes: Outcomes
    metric: Metric
    rounds: int
    difference: Interval | None

    @property
    def chosen(self) -> Arm:
        """The best candidate."""
        return self.candidates[0]

    @property
    def word(self) -> Word:
        """What the judgement says of the chosen settings; undecided where there is none."""
        if self.difference is None or self.difference.low <= 0 <= self.difference.high:
            return "undecided"
        return "better" if self.difference.mean > 0 else "worse"


def tune(bench: Bench, plan: Plan) -> Tuned:
    """Carry out the probes and trainings that are missing.

    Raises:
        RecipeError: for a budget that one round does not fit into, results of something else in the directory, or
            another process at work in it.
        RunError: for a run that ended without an outcome, and probes that all fail.
    """
    recipe = bench.load()
    candidates = plan.candidates(recipe)
    _check_costs(plan, candidates, recipe)
    metric = recipe.metric
    worst = metric.worst(describe_data(recipe).choices)
    task = {"purpose": "tune", "steps": plan.steps, "probe_steps": plan.probe_steps}
    with Trials(bench, recipe, DECIDED, **task) as trials:
        total = sum(plan.sizes(len(candidates)))
        with Progress("Tuning", total, lambda: _table(plan, candidates, trials.outcomes), metric) as progress:
            progress.say(budget_sentence(plan, candidates, recipe))
            left, rounds = candidates, 0
            while rounds < plan.seeds and _affords(plan, left, recipe, trials.outcomes):
                trials.complete(plan.probes(left, rounds), progress)
                left = plan.better_half(left, trials.outcomes)
                rounds += 1
            ranked = plan.ranked(candidates, trials.outcomes)
            if math.isinf(statistics.fmean(plan.losses(ranked[0], trials.outcomes))):
                fix = f"Lower --learning_rate, with another --output_dir; the logs lie in {bench.directory / 'runs'}"
                raise RunError(Problem("probes", "every one failed", fix))
            judgement = [] if ranked[0] is OWN else plan.judgement(ranked[0])
            progress.expect(len(trials.outcomes) + len(judgement))
            trials.complete(judgement, progress)
            difference = _difference(plan, ranked[0], trials.outcomes, metric, worst) if judgement else None
        return Tuned(recipe_name(recipe.path), plan, ranked, dict(trials.outcomes), metric, rounds, difference)


def budget_sentence(plan: Plan, candidates: Sequence[Arm], recipe: Recipe) -> str:
    """What a search takes, before it begins."""
    sizes = plan.sizes(len(candidates))
    probes = plan.expected(candidates, recipe, {}) * sum(sizes) / len(candidates)
    limit = "" if plan.budget is None else f", of which --budget allows {plan.budget:,}"
    judged = 2 * plan.verdict_seeds * plan.steps
    return (
        f"{sum(sizes)} probes in {plan.seeds} rounds ({', '.join(map(str, sizes))} candidates): up to "
        f"{probes:,.0f} training steps, initialisations included{limit}; then {judged:,} to judge."
    )


def _check_costs(plan: Plan, candidates: Sequence[Arm], recipe: Recipe) -> None:
    for arm in candidates:
        cost = initialisation_cost(arm, recipe)
        if math.ceil(cost * plan.probe_steps / plan.steps) >= plan.probe_steps:
            found = (
                f"{plan.steps:,}, where the initialisation takes up to {cost:,.0f} with {arm.description}; the same "
                f"share of a probe of {plan.probe_steps} leaves nothing"
            )
            fix = "Give more, or lower nio_report_batches or nio_batch_size"
            raise RecipeError(Problem("--steps", found, fix))
    first = plan.expected(candidates, recipe, {})
    if plan.budget is not None and first > plan.budget:
        found = f"{plan.budget:,} training steps, where the first round takes up to {math.ceil(first):,}"
        fix = "Give more, fewer candidates, or fewer --probe_steps"
        raise RecipeError(Problem("--budget", found, fix))


def _affords(plan: Plan, arms: Sequence[Arm], recipe: Recipe, outcomes: Outcomes) -> bool:
    """Whether the budget has room for a round more."""
    return plan.budget is None or plan.spent(outcomes) + plan.expected(arms, recipe, outcomes) <= plan.budget


def _difference(plan: Plan, chosen: Arm, outcomes: Outcomes, metric: Metric, worst: float) -> Interval:
    values: dict[str, list[float]] = {OWN.name: [], chosen.name: []}
    for trial in plan.judgement(chosen):
        values[trial.arm.name].append(outcomes[trial.run].value_or(worst))
    return paired_gain(metric, values[chosen.name], values[OWN.name])


def _table(plan: Plan, candidates: Sequence[Arm], outcomes: Outcomes) -> Table:
    """The losses so far."""
    table = Table(box=None, pad_edge=False)
    table.add_column(f"loss after {plan.probe_steps} steps")
    for seed in range(plan.seeds):
        table.add_column(f"seed {seed}", justify="right")
    for arm in candidates:
        table.add_row(arm.description, *(f"{loss:.4f}" for loss in plan.losses(arm, outcomes)))
    return table
