"""Arms and the runs of a comparison."""

import pytest

from nio_hf.errors import RecipeError
from nio_hf.recipe.keys import known_keys
from nio_hf.study.arms import ARMS, CONTROLLED, choose_arms
from nio_hf.study.compare import most_runs, plan_problems
from nio_hf.study.plan import FIRST_VERDICT_SEED, QUIET
from nio_hf.study.tune import CONTROLLED as CONTROLLED_BY_TUNE
from tests.study.outcomes import plan


def test_every_arm_sets_what_the_others_set_and_a_study_what_recipes_have():
    """Otherwise one arm would keep the method of the recipe, and another would not."""
    assert {*CONTROLLED, *CONTROLLED_BY_TUNE, *QUIET} <= known_keys().keys()
    for arm in ARMS.values():
        assert {"nio", "nio_seed_optimizer", "optimizer"} <= arm.settings.keys()
        assert arm.settings.keys() <= known_keys().keys()
        if arm.settings["nio"]:
            assert {"nio_method", "nio_method_kwargs"} <= arm.settings.keys()


def test_a_defined_arm_is_a_known_one_with_other_settings():
    groups = {"a": "x[12]", "b": "y"}
    (arm,) = choose_arms([], ["low=nio_seeded,nio_groups={a: 'x[12]', b: y},nio_scale_range=[0.8,2],nio_lr=1e-2"])
    assert arm.name == "low"
    changes = {"nio_groups": groups, "nio_scale_range": [0.8, 2], "nio_lr": 0.01}
    assert arm.settings == {**ARMS["nio_seeded"].settings, **changes}
    assert choose_arms([], ["long=warmup"])[0].has_warmup


@pytest.mark.parametrize(
    ("names", "definitions", "found"),
    [
        (["nio", "nioo"], [], "'nioo' is no known arm"),
        (["nio", "nio"], [], "'nio' stands twice"),
        ([], [], "--arms: none"),
        (["nio"], ["nio=nio"], "'nio' is taken"),
        (["nio"], ["low"], "--arm: 'low'"),
        (["nio"], ["low=other"], "--arm: 'low=other', and 'other' is no arm. Name one of"),
        (["nio"], ["low=nio,gamma"], "'gamma' in 'low=nio,gamma'"),
        (["nio"], ["low=nio,seed=1"], "--arm low, seed: is decided by this command. Use --seeds"),
        (["x", "y"], ["z"], "3 problems"),
    ],
)
def test_arms_that_do_not_exist_are_refused(names, definitions, found):
    with pytest.raises(RecipeError, match=found):
        choose_arms(names, definitions)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"learning_rates": ()}, "--learning_rates: none"),
        ({"learning_rates": (1e-3, 1e-3)}, "different ones above 0"),
        ({"learning_rates": (float("nan"),)}, "different ones above 0"),
        ({"learning_rates": (-1e-3,)}, "different ones above 0"),
        ({"warmup_ratios": ()}, "none, with an arm that warms up"),
        ({"warmup_ratios": (1.0,)}, "shares of the steps"),
        ({"seeds": 0, "verdict_seeds": 0}, "--seeds: 0"),
        ({"warmup_ratios": (0.001, 0.1)}, "0.001, 0.1, of which the least is no whole step of 100"),
        ({"seeds": 1, "verdict_seeds": 1}, "or more of both for a verdict, or --no_verdict"),
        ({"seeds": 3, "verdict_seeds": 2}, "3 to choose by and 2 to judge by"),
        ({"arms": choose_arms(["nio"])}, "no no_warmup and no warmup to compare the others with"),
    ],
)
def test_a_comparison_that_cannot_conclude_is_refused(changes, found):
    assert not list(plan_problems(plan()))
    (problem,) = plan_problems(plan(**changes))
    assert found in str(problem)


def test_the_grid_has_every_run_once_seed_by_seed():
    grid = plan().selection()
    assert len(grid) == len(set(grid)) == 3 * 2 * (1 + 2 + 1)
    assert [(run.seed, run.learning_rate) for run in grid] == sorted((run.seed, run.learning_rate) for run in grid)
    assert len({run.name for run in grid}) == len(grid)
    assert {run.warmup_ratio for run in grid if run.arm != "warmup"} == {0.0}


def test_the_verdict_is_on_seeds_that_the_choice_has_not_seen():
    made = plan(verdict_seeds=5)
    runs = made.fresh([("nio", 1e-3, 0.0), ("warmup", 2e-3, 0.1)])
    assert len(runs) == 10
    assert {run.seed for run in runs} == set(range(FIRST_VERDICT_SEED, FIRST_VERDICT_SEED + 5))
    assert not {run.seed for run in runs} & {run.seed for run in made.selection()}
    assert most_runs(made) == 24 + 5 * (3 + 2)
