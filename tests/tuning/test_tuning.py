"""A search for settings, with trainings that are made up: which are asked for, and what follows."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nio_hf.core import expected_cost
from nio_hf.errors import RecipeError
from nio_hf.metrics import IMAGE_CLASSIFICATION, LOSS, METRICS
from nio_hf.recipe.loading import load_recipe
from nio_hf.trials import bench as bench_module
from nio_hf.trials.bench import Bench
from nio_hf.trials.results import Outcome
from nio_hf.trials.run import FIRST_VERDICT_SEED, Run
from nio_hf.trials.schedule import RunError
from nio_hf.trials.worker import Order
from nio_hf.tuning.plan import OWN, Plan, initialisation_cost, tuned_settings
from nio_hf.tuning.report import rows, sentences, settings_yaml, write_report
from nio_hf.tuning.tuning import Tuned, tune

RECIPE = "vit-tiny/digits/nio"
Loss = Callable[[Run], float | None]


def plan(**changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "groups": ("additive", "model"),
        "strengths": (0.25, 0.5, 0.75, 1.5),
        "learning_rate": 1e-3,
        "seeds": 3,
        "probe_steps": 50,
        "steps": 500,
        "verdict_seeds": 3,
    }
    return Plan(**{**settings, **changes})


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Tuned, list[Run], list[Order]]]:
    """Searches with made-up losses (of probes) and values of the metric (of whole trainings)."""

    def run(made: Plan, loss: Loss, value: Loss = lambda run: 50.0) -> tuple[Tuned, list[Run], list[Order]]:
        runs: list[Run] = []
        orders: list[Order] = []

        def execute(pending: Sequence[Run], order_for: Any, jobs: int, on_outcome: Any, on_start: Any) -> None:
            for run in pending:
                runs.append(run)
                orders.append(order_for(run))
                on_start(run)
                on_outcome(run, _outcome(run, loss(run), value(run)))

        monkeypatch.setattr(bench_module, "execute", execute)
        return tune(Bench(RECIPE, (), tmp_path), made), runs, orders

    return run


def _outcome(run: Run, loss: float | None, value: float | None) -> Outcome:
    failed = (loss if run.stage == "probe" else value) is None
    steps = 50 if run.stage == "probe" else 480
    summary = {"grad_cosine": [0.1, 0.2], "grad_norm": [1.0, 2.0]}
    error = "the loss is not finite" if failed else None
    value = None if failed else 50.0 if run.stage == "probe" else value
    return Outcome(value, loss, (2.0,), (1.0,), steps, 20.0, 1.0, 2.0, error, summary)


def _half(run: Run) -> float:
    """Loss that is best for one group with half the strength, with a spread over the seeds that all share."""
    groups, _, strength = run.arm.partition("-")
    better = 0.2 * (groups == "model") + 0.1 * (strength in ("0.5", "0.75")) + 0.05 * (strength == "0.5")
    return 2.0 + 0.3 * run.seed - better


def test_each_round_halves_the_candidates_and_keeps_the_recipes_own(search: Any) -> None:
    made = plan()
    tuned, runs, orders = search(made, _half, lambda run: 50.0 + (run.arm != "own") + run.seed % 3)
    probes = [run for run in runs if run.stage == "probe"]
    by_seed = [[run.arm for run in probes if run.seed == seed] for seed in range(3)]
    assert [len(arms) for arms in by_seed] == made.sizes(9) == [9, 5, 3]
    assert all(OWN.name in arms for arms in by_seed)
    assert set(by_seed[1]) == {"own", *(f"model-{strength}" for strength in (0.25, 0.5, 0.75, 1.5))}
    assert set(by_seed[2]) == {"own", "model-0.5", "model-0.75"}
    assert tuned.chosen.name == "model-0.5"
    assert tuned.difference is not None
    assert tuned.difference.values == (1.0, 1.0, 1.0)
    assert tuned.word == "better"
    judged = [run for run in runs if run.stage == "verdict"]
    assert {run.seed for run in judged} == set(range(FIRST_VERDICT_SEED, FIRST_VERDICT_SEED + 3))
    assert {run.arm for run in judged} == {"own", "model-0.5"}
    for order, run in zip(orders, runs, strict=True):
        probe = run.stage == "probe"
        assert ("--eval_from_train" in " ".join(order.overrides)) == probe
        assert order.cost_share == (0.1 if probe else 1.0)
    text = " ".join(said := sentences(tuned))
    assert "17 probes of 50 steps took 1,190 training steps, 340 of them for initialisations" in text
    assert "Chosen: groups model, strength 0.5. Loss 1.9500" in text
    assert "2.3000 with the recipe's own settings (mean of 3 seeds)" in text
    assert said[-1] == (
        "On 3 fresh seeds and 500 steps it is better than the recipe's own settings (a gain of +1.00 ± 0.00 points of "
        "accuracy, 90% paired interval)."
    )


def test_what_is_best_by_itself_is_kept_and_not_judged(search: Any) -> None:
    tuned, runs, _ = search(plan(), lambda run: 1.0 if run.arm == "own" else 2.0)
    assert tuned.chosen is OWN
    assert {run.stage for run in runs} == {"probe"}
    assert "No candidate does better" in " ".join(sentences(tuned))
    assert "nio_" not in settings_yaml(tuned).split("\n# ")[-1].split("\n", 1)[-1]


@pytest.mark.parametrize(("gain", "word"), [(-2.0, "worse"), (0.01, "undecided")])
def test_a_choice_that_is_not_surely_better_is_not_advised(search: Any, gain: float, word: str) -> None:
    noise = {FIRST_VERDICT_SEED: 0.5, FIRST_VERDICT_SEED + 1: -0.5}
    tuned, _, _ = search(plan(), _half, lambda run: 50.0 + (run.arm != "own") * (gain + noise.get(run.seed, 0.0)))
    assert tuned.word == word
    assert "keep those" in " ".join(sentences(tuned))
    assert settings_yaml(tuned).endswith('\n# nio_groups: "model"\n# nio_strength: 0.5\n')


@pytest.mark.parametrize(("rise", "word"), [(-0.02, "better"), (0.02, "worse"), (0.0, "undecided")])
def test_the_choice_is_judged_by_the_metric_of_the_recipe(
    search: Any, rise: float, word: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(METRICS, IMAGE_CLASSIFICATION, LOSS)
    noise = {FIRST_VERDICT_SEED: 0.001, FIRST_VERDICT_SEED + 1: -0.001}
    tuned, _, _ = search(plan(), _half, lambda run: 2.5 + (run.arm != "own") * (rise + noise.get(run.seed, 0.0)))
    assert tuned.word == word
    assert tuned.difference is not None
    assert tuned.difference.mean == pytest.approx(-rise)
    # Half width of noise 0.001, -0.001, 0: 2.919986 * 0.001 / sqrt(3) = 0.0017.
    assert re.search(rf"\(a gain of [+-]{abs(rise):.4f} ± 0\.0017 nats, 90% paired interval\)", sentences(tuned)[-1])
    for what in ("Settings", "Table", "Numbers"):
        assert "accura" not in write_report(tuned, tmp_path)[what].read_text(encoding="utf-8").lower()


def test_a_failed_training_has_the_loss_of_a_model_that_knows_nothing(
    search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, IMAGE_CLASSIFICATION, LOSS)
    tuned, _, _ = search(plan(), _half, lambda run: 2.0 if run.arm == "own" else None)
    assert tuned.difference is not None
    assert tuned.difference.values == pytest.approx([2.0 - math.log(10)] * 3)


def test_probes_that_fail_come_last_and_failed_trainings_count_as_chance(search: Any) -> None:
    tuned, _, _ = search(
        plan(), lambda run: None if "additive" in run.arm else 2.0 - ("model" in run.arm), lambda run: None
    )
    assert "model" in tuned.chosen.name
    assert all("additive" in arm.name for arm in tuned.candidates[-4:])
    assert tuned.difference is not None
    assert tuned.difference.values == (0.0, 0.0, 0.0)


def test_probes_that_all_fail_are_an_error(search: Any) -> None:
    with pytest.raises(RunError, match="probes: every one failed"):
        search(plan(), lambda run: None)


def test_the_point_of_the_grid_that_the_recipe_has_is_not_tried_twice() -> None:
    recipe = load_recipe(RECIPE)
    own = recipe.training.to_nio_config()
    made = plan(groups=(own.groups, "model"), strengths=(own.strength, 0.5))
    assert len(made.candidates(recipe)) == 4
    named = load_recipe(RECIPE, ["--nio_groups", '{"positions": "position_embeddings"}'])
    assert len(made.candidates(named)) == 5
    words = {tuned_settings(arm)["nio_groups"] for arm in made.candidates(named)[1:]}
    assert words == {"additive", "model"}


def test_a_recipe_of_the_published_search_has_no_strength_to_tune() -> None:
    with pytest.raises(RecipeError, match=r"nio_search: published\. Set nio_search to balance"):
        plan().candidates(load_recipe("resnet-18/cifar10/nio"))


def test_the_budget_ends_the_search(search: Any) -> None:
    recipe = load_recipe(RECIPE)
    made = plan(verdict_seeds=0)
    candidates = made.candidates(recipe)
    first = made.expected(candidates, recipe, {})
    tuned, runs, _ = search(plan(verdict_seeds=0, budget=math.ceil(first)), _half)
    assert {run.seed for run in runs} == {0}
    assert tuned.rounds == 1
    assert "The budget ended the search after 1 of 3 rounds" in " ".join(sentences(tuned))
    assert "It was not judged" in " ".join(sentences(tuned))


def test_a_budget_that_one_round_does_not_fit_into_is_refused(search: Any) -> None:
    with pytest.raises(RecipeError, match=r"--budget: 400 training steps, where the first round takes up to"):
        search(plan(budget=400), _half)


def test_an_initialisation_that_costs_the_whole_training_is_refused(search: Any) -> None:
    with pytest.raises(RecipeError, match=r"--steps: 10, where the initialisation takes up to \d+ with"):
        search(plan(probe_steps=10, steps=10), _half)


def test_the_cost_beforehand_is_that_of_all_candidates_and_the_report_before() -> None:
    options = ["--nio_report_batches", "3", "--per_device_train_batch_size", "32"]
    recipe = load_recipe(RECIPE, options)
    assert recipe.training.nio_batch_size == 64
    own, model = plan(groups=("model",), strengths=(1.0,)).candidates(recipe)
    assert initialisation_cost(own, recipe) == 2 * expected_cost(recipe.training.to_nio_config(), groups=2)
    # The scales are at most 100 = 2^6.6, so that 6.6 and its halves down to 0.42 may be tried.
    assert initialisation_cost(model, recipe) == (1 + 5) * 3 * 2, "the report before, and one for each candidate"


def test_a_search_goes_on_where_it_was(search: Any) -> None:
    _, first, _ = search(plan(seeds=1, verdict_seeds=0), _half)
    tuned, rest, _ = search(plan(), _half)
    assert len(first) == 9
    assert not set(first) & set(rest)
    assert tuned.rounds == 3
    assert search(plan(), _half)[1] == []


def test_what_a_search_writes(search: Any, tmp_path: Path) -> None:
    tuned, _, _ = search(plan(), _half, lambda run: 50.0 + (run.arm != "own"))
    written = write_report(tuned, tmp_path)
    assert all(file.stat().st_size > 0 for file in written.values())
    again = load_recipe(RECIPE, [f"--{line.replace(': ', '=')}" for line in _settings(written["Settings"])])
    assert (again.training.nio_groups, again.training.nio_strength) == ("model", 0.5)
    found = json.loads(written["Numbers"].read_text(encoding="utf-8"))
    assert found["chosen"] == tuned.chosen.name
    assert len(found["candidates"]) == 9
    assert len(rows(tuned)) == 9
    assert rows(tuned)[0][4] == "20.0"


def _settings(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"groups": ()}, "--groups: none"),
        ({"groups": ("model", "tensor")}, "--groups: model, tensor. Give at least one of additive, model, each once"),
        ({"groups": ("model", "model")}, "--groups: model, model"),
        ({"strengths": ()}, "--strengths: none. Give at least one"),
        ({"strengths": (1.5, 1.5)}, "--strengths: 1.5, 1.5. Give different ones above 0"),
        ({"strengths": (0.0, 1.0)}, "--strengths: 0, 1. Give different ones above 0"),
        ({"strengths": (-0.1,)}, "--strengths: -0.1"),
        ({"seeds": 0}, "--seeds: 0"),
        ({"probe_steps": 501}, "--probe_steps: 501, of whole trainings of 500"),
        ({"probe_steps": 0}, "--probe_steps: 0"),
        ({"verdict_seeds": 2}, "Give 3 or more to judge by, or --no_verdict"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(**changes)
    assert found in str(caught.value)
