"""What is tried: the recipe's own settings of NIO and a grid of others, fewer of them round by round.

In round k every candidate that is left is probed with seed k: it initialises the model and trains for a few steps
without warmup. After each round the better half is left (successive halving: Jamieson and Talwalkar, AISTATS 2016,
arXiv 1502.07943), by the mean loss over the rounds so far, on a part of the training data that is set aside. The
recipe's own settings stay to the end, to hold the others against.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from nio_hf.errors import Problem, RecipeError
from nio_hf.recipe.loading import Recipe
from nio_hf.trials.costs import most_steps
from nio_hf.trials.results import Outcome
from nio_hf.trials.run import FIRST_VERDICT_SEED, MIN_SEEDS, WITH_NIO, Arm, Run, Trial, can_be_tried, format_number

GROUPS = ("additive", "model")
OWN = Arm("own", "the recipe's own settings", WITH_NIO)
DECIDED = {
    "warmup_steps": "Leave it out: the trainings have no warmup",
    "max_steps": "Use --steps",
    "num_train_epochs": "Use --steps",
    "seed": "Use --seeds",
    "data_seed": "Use --seeds",
    "nio_seed": "Use --seeds",
    "nio": "Leave it out: every training starts with NIO",
    "nio_method": "Leave it out: only NIO is tuned",
    "nio_method_kwargs": "Leave it out: only NIO is tuned",
    "eval_from_train": "Leave it out: a part of the training data chooses, the evaluation data judge",
    "resume_from_checkpoint": "Leave it out: the same command goes on",
    "push_to_hub": "Leave it out: trainings of a search are not pushed",
}
"""{setting of the recipe that a search decides itself: what to do instead}."""
Outcomes = Mapping[Run, Outcome]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A search.

    Attributes:
        groups: values of `nio_groups` to try, in words.
        strengths: values of `nio_strength` to try.
        learning_rate: peak of the trainings.
        seeds: number of rounds.
        probe_steps: length of a probe, in training steps.
        steps: length of a whole training, initialisation included.
        verdict_seeds: fresh seeds to judge by; 0 not to judge.
        budget: training steps, initialisations included, beyond which no round of probes is begun; None for no limit.
    """

    groups: tuple[str, ...]
    strengths: tuple[float, ...]
    learning_rate: float
    seeds: int
    probe_steps: int
    steps: int
    verdict_seeds: int
    budget: int | None = None

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise RecipeError(*problems)

    def _problems(self) -> Iterator[Problem]:
        if not self.groups or len(set(self.groups)) < len(self.groups) or not set(self.groups) <= set(GROUPS):
            fix = f"Give at least one of {', '.join(GROUPS)}, each once"
            yield Problem("--groups", ", ".join(self.groups) or "none", fix)
        if not self.strengths:
            yield Problem("--strengths", "none", "Give at least one, e.g. 0.5")
        elif not can_be_tried(self.strengths):
            yield Problem("--strengths", ", ".join(map(format_number, self.strengths)), "Give different ones above 0")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            yield Problem("--learning_rate", f"{self.learning_rate:g}", "Give a number above 0")
        if not 1 <= self.seeds <= FIRST_VERDICT_SEED:
            yield Problem("--seeds", f"{self.seeds}", f"Give 1 to {FIRST_VERDICT_SEED}")
        if not 1 <= self.probe_steps <= self.steps:
            found = f"{self.probe_steps}, of whole trainings of {self.steps}"
            yield Problem("--probe_steps", found, "Give at least 1, and no more than --steps")
        if self.verdict_seeds and self.verdict_seeds < MIN_SEEDS:
            fix = f"Give {MIN_SEEDS} or more to judge by, or --no_verdict"
            yield Problem("--verdict_seeds", f"{self.verdict_seeds}", fix)

    def candidates(self, recipe: Recipe) -> list[Arm]:
        """The recipe's own settings and the grid, without the point of it that is the same.

        Raises:
            RecipeError: for a recipe whose scales are not computed, so that they have no strength.
        """
        config = recipe.training.to_nio_config()
        if config.search != "balance":
            fix = "Set nio_search to balance: groups and strength of its scales are tuned"
            raise RecipeError(Problem("nio_search", config.search, fix))
        own = (config.groups, config.strength)
        grid = itertools.product(self.groups, self.strengths)
        return [OWN, *(_candidate(*point) for point in grid if point != own)]

    def probes(self, arms: Sequence[Arm], seed: int) -> list[Trial]:
        """The probes of a round. An initialisation pays the same share of a probe as it would of a whole training."""
        return [Trial(self._probe(arm, seed), arm, self.probe_steps, self.probe_steps / self.steps) for arm in arms]

    def judgement(self, chosen: Arm) -> list[Trial]:
        """Whole trainings with the chosen and the recipe's own settings, on seeds that the search has not seen."""
        return [
            Trial(Run("verdict", arm.name, self.learning_rate, 0.0, FIRST_VERDICT_SEED + number), arm, self.steps)
            for number in range(self.verdict_seeds)
            for arm in (OWN, chosen)
        ]

    def losses(self, arm: Arm, outcomes: Outcomes) -> list[float]:
        """Loss of each probe of a candidate, by round; infinite where it failed."""
        own = [outcomes.get(self._probe(arm, seed)) for seed in range(self.seeds)]
        return [math.inf if outcome.eval_loss is None else outcome.eval_loss for outcome in own if outcome is not None]

    def ranked(self, arms: Sequence[Arm], outcomes: Outcomes) -> list[Arm]:
        """Candidates that have been probed, those that lasted longest first, and among these the lowest mean loss."""
        losses = {arm.name: self.losses(arm, outcomes) for arm in arms}
        return sorted(arms, key=lambda arm: (-len(losses[arm.name]), statistics.fmean(losses[arm.name])))

    def better_half(self, arms: Sequence[Arm], outcomes: Outcomes) -> list[Arm]:
        """The candidates that are left after a round: the recipe's own settings, and the better half of the others."""
        others = self.ranked([arm for arm in arms if arm is not OWN], outcomes)
        return [OWN, *others[: math.ceil(len(others) / 2)]]

    def sizes(self, candidates: int) -> list[int]:
        """Number of candidates in each round, of which one is the recipe's own settings."""
        others = [candidates - 1]
        while len(others) < self.seeds:
            others.append(math.ceil(others[-1] / 2))
        return [1 + number for number in others]

    def spent(self, outcomes: Outcomes) -> float:
        """Training steps that the probes so far took, initialisations included."""
        return sum(outcome.steps + outcome.cost_steps for run, outcome in outcomes.items() if run.stage == "probe")

    def expected(self, arms: Sequence[Arm], recipe: Recipe, outcomes: Outcomes) -> float:
        """Training steps that the probes of a round may take, initialisations included."""
        return sum(self._expected_of(arm, recipe, outcomes) for arm in arms)

    def _expected_of(self, arm: Arm, recipe: Recipe, outcomes: Outcomes) -> float:
        """What the probes of a candidate took so far, or else what its initialisation may cost."""
        known = [outcomes[run] for seed in range(self.seeds) if (run := self._probe(arm, seed)) in outcomes]
        if known:
            return statistics.fmean(outcome.steps + outcome.cost_steps for outcome in known)
        return self.probe_steps + (1 - self.probe_steps / self.steps) * initialisation_cost(arm, recipe)

    def _probe(self, arm: Arm, seed: int) -> Run:
        return Run("probe", arm.name, self.learning_rate, 0.0, seed)


def _candidate(groups: str, strength: float) -> Arm:
    settings = {"nio_groups": groups, "nio_strength": strength}
    number = format_number(strength)
    return Arm(f"{groups}-{number}", f"groups {groups}, strength {number}", {**WITH_NIO, **settings})


def tuned_settings(arm: Arm) -> dict[str, Any]:
    """The settings of a recipe that a candidate changes."""
    return {key: value for key, value in arm.settings.items() if key not in WITH_NIO}


def initialisation_cost(arm: Arm, recipe: Recipe) -> float:
    """Training steps that the initialisation of a candidate may cost at most."""
    return cast(float, most_steps(recipe.training, arm.settings.get("nio_groups")))
