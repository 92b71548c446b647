"""The directory of trials, and what is found out before the first of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from nio_hf.comparison.arms import choose_arms
from nio_hf.errors import RecipeError
from nio_hf.recipe.loading import load_recipe
from nio_hf.trials.bench import Bench, Trials
from tests.comparison.outcomes import plan

RECIPE = "vit-tiny/digits/nio"


def test_folders_of_trainings_that_were_killed_are_removed(tmp_path: Path) -> None:
    bench = Bench(RECIPE, (), tmp_path)
    (bench.runs / ".nio-trial-before").mkdir(parents=True)
    (bench.runs / "probe.log").touch()
    with Trials(bench, load_recipe(RECIPE), ()):
        assert [path.name for path in bench.runs.iterdir()] == ["probe.log"]
        (bench.runs / ".nio-trial-now").mkdir()
    assert [path.name for path in bench.runs.iterdir()] == ["probe.log"]


def test_the_problems_of_all_arms_are_reported_at_once(tmp_path: Path) -> None:
    definitions = ["low=nio,nio_gama=1", "high=nio,nio_loss_bound=-1", "other=gradinit,nio_method_kwargs.steps=3"]
    made = plan(arms=choose_arms(["no_warmup", "warmup", "gradinit", "lsuv"], definitions))
    with pytest.raises(RecipeError) as raised:
        Bench(RECIPE, (), tmp_path).check(made.trials(made.grid()))
    assert [problem.where for problem in raised.value.problems] == [
        "arm low, --nio_gama",
        "arm high, --nio_loss_bound",
        "arm other, --nio_method_kwargs.steps",
    ]


def test_an_option_of_a_method_is_changed_beside_the_others_of_its_arm(tmp_path: Path) -> None:
    (arm,) = choose_arms([], ["long=gradinit,nio_method_kwargs.iterations=60"])
    made = plan(arms=(arm,), verdict_seeds=0)
    order = Bench(RECIPE, (), tmp_path).order_for(made.trials(made.grid())[0])
    assert load_recipe(RECIPE, order.overrides).training.nio_method_kwargs == {"iterations": 60, "lr": 0.03}


@pytest.mark.parametrize(("steps", "refused"), [(25, True), (26, False)])
def test_an_arm_whose_initialisation_may_cost_the_whole_budget_is_refused(
    steps: int, refused: bool, tmp_path: Path
) -> None:
    made = plan(steps=steps, warmup_ratios=(0.1,))
    bench = Bench(RECIPE, (), tmp_path)
    if not refused:
        bench.check(made.trials(made.grid()))
        return
    with pytest.raises(RecipeError, match=r"^arm nio, --steps: 25, where the initialisation takes up to 25 training"):
        bench.check(made.trials(made.grid()))
