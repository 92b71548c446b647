"""`nio-hf tune`: which groups and strength of NIO?

Round k probes every remaining candidate with seed k: a probe initialises the model and trains it for a few steps
without warmup. After each round the better half remains (successive halving: Jamieson and Talwalkar, AISTATS 2016,
arXiv 1502.07943), by the mean loss over the rounds so far, on a part of the training data that is set aside. The
recipe's own settings remain to the end for comparison.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from nio_hf.errors import Problem, RecipeError
from nio_hf.recipe.loading import Recipe
from nio_hf.study.costs import most_steps
from nio_hf.study.findings import Evidence
from nio_hf.study.intervals import Interval, Word, gain_text, judge, paired_gain
from nio_hf.study.options import Report, TableOf
from nio_hf.study.plan import DECIDED, MIN_SEEDS, WITH_NIO, Arm, Plan, Run, grid_problems, seed_problems
from nio_hf.study.plots import plot_probes
from nio_hf.study.results import Outcome
from nio_hf.study.runner import RunError, Study
from nio_hf.tasks import describe_data

GROUPS = ("additive", "model")
OWN = Arm("own", "the recipe's own settings", WITH_NIO)
CONTROLLED = {
    **DECIDED,
    "warmup_steps": "Leave it out: the trainings have no warmup",
    "nio": "Leave it out: every training starts with NIO",
    "nio_method": "Leave it out: only NIO is tuned",
    "nio_method_kwargs": "Leave it out: only NIO is tuned",
}
"""{setting of the recipe that a search decides itself: advice}."""


@dataclasses.dataclass(frozen=True)
class Search(Evidence):
    """The findings of a search so far."""

    def probe(self, arm: Arm, seed: int) -> Run:
        """Return the probe of a candidate in a round."""
        return Run("probe", arm.name, self.plan.learning_rates[0], 0.0, seed)

    def probes(self, arm: Arm) -> list[Outcome]:
        """Return the outcomes of the probes of a candidate, by round."""
        runs = [self.probe(arm, seed) for seed in range(self.plan.seeds)]
        return [self.outcomes[run] for run in runs if run in self.outcomes]

    def losses(self, arm: Arm) -> list[float]:
        """Return the loss of each probe of a candidate, by round; infinite for a probe that failed."""
        return [math.inf if probe.eval_loss is None else probe.eval_loss for probe in self.probes(arm)]

    def rank(self, arms: Sequence[Arm]) -> list[Arm]:
        """Sort candidates that have been probed: those with the most rounds first, among these by mean loss."""
        losses = {arm.name: self.losses(arm) for arm in arms}
        return sorted(arms, key=lambda arm: (-len(losses[arm.name]), statistics.fmean(losses[arm.name])))

    def better_half(self, arms: Sequence[Arm]) -> list[Arm]:
        """Return the candidates that remain after a round: the recipe's own settings, and half of the others."""
        others = self.rank([arm for arm in arms if arm is not OWN])
        return [OWN, *others[: math.ceil(len(others) / 2)]]

    @cached_property
    def candidates(self) -> list[Arm]:
        """Candidates, from the best on."""
        return self.rank(self.plan.arms)

    @property
    def chosen(self) -> Arm:
        """Best candidate."""
        return self.candidates[0]

    @property
    def rounds(self) -> int:
        """Number of rounds that were carried out."""
        return len(self.probes(OWN))

    @property
    def spent(self) -> float:
        """Training steps of the probes so far, initialisations included."""
        return sum(o.steps + o.cost_steps for run, o in self.outcomes.items() if run.stage == "probe")

    def expected(self, arms: Sequence[Arm], recipes: Mapping[str, Recipe]) -> float:
        """Return the expected training steps of a round: the means of former rounds, in the first the maxima."""
        steps, found = self.plan.probe_steps, 0.0
        for arm in arms:
            known = [probe.steps + probe.cost_steps for probe in self.probes(arm)]
            most = most_steps(recipes[arm.name].training) or 0.0
            found += statistics.fmean(known) if known else steps + (1 - steps / self.plan.steps) * most
        return found

    @cached_property
    def difference(self) -> Interval | None:
        """Gain of the chosen settings over the recipe's own, paired over the fresh seeds; None without a verdict."""
        own, chosen = (self.fresh_values(self.probe(arm, 0).point) for arm in (OWN, self.chosen))
        return paired_gain(self.metric, chosen, own) if own and chosen and self.chosen is not OWN else None

    @property
    def word(self) -> Word:
        """Word for the difference; "undecided" without a verdict."""
        return "undecided" if self.difference is None else judge(self.difference, margin=0.0)


def tune(study: Study) -> Search:
    """Carry out the missing probes and trainings of a search, and return its findings.

    Raises:
        RecipeError: A budget that the first round exceeds, results of another study in the directory, or another
            process at work in it.
        RunError: A run that ended without an outcome, or probes that all failed.
    """
    plan, metric = study.plan, study.recipe.metric
    worst = metric.worst(describe_data(study.recipe).choices)

    def find() -> Search:
        return Search(study.title, plan, dict(study.outcomes), metric, worst)

    sizes, first = round_sizes(plan), find().expected(plan.arms, study.recipes)
    if plan.budget is not None and first > plan.budget:
        found = f"{plan.budget:,} training steps, where the first round takes up to {math.ceil(first):,}"
        raise RecipeError(Problem("--budget", found, "Give more, fewer candidates, or fewer --probe_steps"))
    with study.opened(sum(sizes)):
        limit = "" if plan.budget is None else f", of which --budget allows {plan.budget:,}"
        study.say(
            f"{sum(sizes)} probes in {plan.seeds} rounds ({', '.join(map(str, sizes))} candidates): up to "
            f"{first * sum(sizes) / sizes[0]:,.0f} training steps, initialisations included{limit}; then "
            f"{2 * plan.verdict_seeds * plan.steps:,} to judge."
        )
        left: Sequence[Arm] = plan.arms
        for seed in range(plan.seeds):
            search = find()
            if plan.budget is not None and search.spent + search.expected(left, study.recipes) > plan.budget:
                break
            study.complete([search.probe(arm, seed) for arm in left])
            left = find().better_half(left)
        search = find()
        if math.isinf(statistics.fmean(search.losses(search.chosen))):
            fix = f"Lower --learning_rate, with another --output_dir; the logs lie in {study.runs}"
            raise RunError(Problem("probes", "every one failed", fix))
        arms = () if search.chosen is OWN else (OWN, search.chosen)
        judged = plan.fresh([search.probe(arm, 0).point for arm in arms])
        study.complete(judged, len(study.outcomes) + len(judged))
    return find()


def candidate_problems(recipe: Recipe, groups: Sequence[str], strengths: Sequence[float]) -> Iterator[Problem]:
    """Yield the problems of the settings to try."""
    if not groups or len(set(groups)) < len(groups) or not set(groups) <= set(GROUPS):
        yield Problem("--groups", ", ".join(groups) or "none", f"Give at least one of {', '.join(GROUPS)}, each once")
    yield from grid_problems("--strengths", strengths, "0.5")
    if (search := recipe.training.to_nio_config().search) != "balance":
        fix = "Set nio_search to balance: groups and strength of its scales are tuned"
        yield Problem("nio_search", search, fix)


def make_candidates(recipe: Recipe, groups: Sequence[str], strengths: Sequence[float]) -> tuple[Arm, ...]:
    """Return the candidates: the recipe's own settings, and the other points of the grid."""
    config = recipe.training.to_nio_config()
    grid = [point for point in itertools.product(groups, strengths) if point != (config.groups, config.strength)]
    return OWN, *(
        Arm(
            f"{words}-{strength:g}",
            f"groups {words}, strength {strength:g}",
            {**WITH_NIO, "nio_groups": words, "nio_strength": strength},
        )
        for words, strength in grid
    )


def plan_problems(plan: Plan) -> Iterator[Problem]:
    """Yield the problems of a search, with the options that cause them."""
    yield from seed_problems(plan)
    if not 1 <= plan.probe_steps <= plan.steps:
        found = f"{plan.probe_steps}, of whole trainings of {plan.steps}"
        yield Problem("--probe_steps", found, "Give at least 1, and no more than --steps")
    if plan.verdict_seeds and plan.verdict_seeds < MIN_SEEDS:
        fix = f"Give {MIN_SEEDS} or more to judge by, or --no_verdict"
        yield Problem("--verdict_seeds", f"{plan.verdict_seeds}", fix)


def round_sizes(plan: Plan) -> list[int]:
    """Return the number of candidates in each round, the recipe's own settings included."""
    sizes = [len(plan.arms)]
    while len(sizes) < plan.seeds:
        sizes.append(1 + math.ceil((sizes[-1] - 1) / 2))
    return sizes


def sentences(search: Search) -> list[str]:
    """Return the conclusions of a search in words."""
    plan, chosen = search.plan, search.chosen
    probes = [outcome for run, outcome in search.outcomes.items() if run.stage == "probe"]
    said = [
        f"{len(probes)} probes of {plan.probe_steps} steps took {search.spent:,.0f} training steps, "
        f"{sum(probe.cost_steps for probe in probes):,.0f} of them for initialisations."
    ]
    if search.rounds < plan.seeds:
        said.append(f"The budget ended the search after {search.rounds} of {plan.seeds} rounds.")
    if chosen is OWN:
        return [*said, "No candidate does better than the recipe's own settings."]
    said.append(
        f"Chosen: {chosen.description}. Loss {statistics.fmean(search.losses(chosen)):.4f} after {plan.probe_steps} "
        f"steps, {statistics.fmean(search.losses(OWN)):.4f} with the recipe's own settings (mean of {search.rounds} "
        "seeds)."
    )
    if search.difference is None:
        return [*said, "It was not judged: a short training chose it, a long one may not agree."]
    words = {"beats": "better than", "worse": "worse than"}
    advice = "" if search.word == "beats" else ": keep those"
    said.append(
        f"On {plan.verdict_seeds} fresh seeds and {plan.steps:,} steps it is "
        f"{words.get(search.word, 'not significantly different from')} {OWN.description} "
        f"(a gain of {gain_text(search.metric, search.difference)}, 90% paired interval){advice}."
    )
    return said


def probe_table(search: Search) -> TableOf:
    """Return a row for each candidate, from the best on."""
    rows = []
    for arm in search.candidates:
        losses, probes = search.losses(arm), search.probes(arm)
        mean = statistics.fmean(losses)
        difference = mean - statistics.fmean(search.losses(OWN)[: len(losses)])
        measured = [probe.initialisation for probe in probes if probe.initialisation is not None]
        row = (
            arm.description,
            f"{len(losses)}",
            f"{mean:.4f}" if math.isfinite(mean) else "failed",
            f"{difference:+.4f}" if arm is not OWN and math.isfinite(difference) else "-",
            f"{statistics.fmean(probe.cost_steps for probe in probes):.1f}",
            *(_before_and_after([entry[key] for entry in measured]) for key in ("grad_cosine", "grad_norm")),
        )
        rows.append(row)
    return ("settings", "rounds", "loss", "against own", "cost (steps)", "GradCosine", "gradient norm"), rows


def _before_and_after(pairs: Sequence[Sequence[float]]) -> str:
    """Return the means of pairs as text: before -> after."""
    return " -> ".join(f"{statistics.fmean(values):.3g}" for values in zip(*pairs, strict=True)) or "-"


def make_report(search: Search) -> Report:
    """Return the report of a search."""
    plan = search.plan
    drawn = [(a.description, search.losses(a), a in (search.chosen, OWN)) for a in search.candidates]
    heading = f"Probes of {plan.probe_steps} steps at learning rate {plan.learning_rates[0]:g}, without warmup"
    text = "Mean loss on a part of the training data; after each round the better half remains."
    return Report(
        search.title,
        "settings of NIO",
        sentences(search),
        {heading: (text, probe_table(search))},
        to_dict(search),
        {"Plot": ("probes.png", lambda file: plot_probes(drawn, plan, search.title, file))},
        {"Settings": ("tuned.yaml", settings_yaml(search))},
    )


def tuned_settings(arm: Arm) -> dict[str, Any]:
    """Return the settings of the recipe that a candidate changes."""
    return {key: value for key, value in arm.settings.items() if key not in WITH_NIO}


def settings_yaml(search: Search) -> str:
    """Return the chosen settings for a recipe, commented out unless they were judged to be better."""
    off = "" if search.word == "beats" else "# "
    lines = [f"# {line}" for line in (search.title, *sentences(search))]
    lines += [f"{off}{key}: {json.dumps(value)}" for key, value in tuned_settings(search.chosen).items()]
    return "\n".join(lines) + "\n"


def to_dict(search: Search) -> dict[str, Any]:
    """Return the search in plain values."""
    return {
        "recipe": search.title,
        "metric": dataclasses.asdict(search.metric),
        "plan": dataclasses.asdict(search.plan),
        "candidates": [
            {
                "name": arm.name,
                "settings": tuned_settings(arm),
                "losses": [loss if math.isfinite(loss) else None for loss in search.losses(arm)],
            }
            for arm in search.candidates
        ],
        "rounds": search.rounds,
        "spent_steps": search.spent,
        "chosen": search.chosen.name,
        "difference": None if search.difference is None else dataclasses.asdict(search.difference),
        "word": search.word,
        "words": sentences(search),
    }
