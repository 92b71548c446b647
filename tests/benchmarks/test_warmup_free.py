"""The study of warmup: its comparisons can be carried out."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.warmup_free.study import COMPARISONS, FOLDER, VARIANTS
from nio_hf.comparison.arms import choose_arms
from nio_hf.comparison.plan import Plan
from nio_hf.trials.bench import Bench


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_arm_of_a_comparison_can_be_carried_out(name: str, tmp_path: Path) -> None:
    made = COMPARISONS[name]
    own = FOLDER / f"{made.recipe}.yaml"
    arms = choose_arms(made.arms.split(","), [f"{arm}={text}" for arm, text in made.definitions.items()])
    plan = Plan(arms, _numbers(made.learning_rates), _numbers(made.warmup_ratios), 3, made.verdict_seeds, made.steps)
    bench = Bench(str(own) if own.is_file() else made.recipe, (*made.options, "--bf16", "false"), tmp_path)
    bench.check(plan.trials(plan.grid()))


def test_every_variant_differs_from_the_defaults_in_what_it_says() -> None:
    arms = choose_arms(["nio"], [f"{name}=nio,{settings}" for name, settings in VARIANTS.items()])
    assert len({tuple(sorted(map(str, arm.settings.items()))) for arm in arms}) == len(VARIANTS) + 1
