"""A search for settings with made-up trainings: its runs and its conclusions."""

import json
import math
import re

import pytest
from typer.testing import CliRunner

from nio_hf.cli.main import app
from nio_hf.core import expected_cost
from nio_hf.errors import RecipeError
from nio_hf.metrics import IMAGE_CLASSIFICATION, LOSS, METRICS
from nio_hf.recipe.loading import load_recipe
from nio_hf.study import runner
from nio_hf.study import tune as tuning
from nio_hf.study.costs import most_steps
from nio_hf.study.plan import FIRST_VERDICT_SEED, Plan
from nio_hf.study.results import RESULTS_NAME
from nio_hf.study.runner import RunError, Study
from tests.study.outcomes import outcome

RECIPE = load_recipe("vit-tiny/digits/nio")
STRENGTHS = (0.25, 0.5, 0.75, 1.5)
GRID = ["--groups", "additive,model", "--strengths", "0.5,0.75"]
SMALL = ["--nio_report_batches", "1", "--nio_batch_size", "16"]
SMALL += ["--max_eval_samples", "50", "--max_train_samples", "200"]


def plan(**changes):
    settings = {"seeds": 3, "verdict_seeds": 3, "steps": 500, "probe_steps": 50, **changes}
    return Plan(tuning.make_candidates(RECIPE, ("additive", "model"), STRENGTHS), (1e-3,), (), **settings)


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Searches with made-up losses (of probes) and values of the metric (of whole trainings)."""

    def run(made, loss, value=lambda run: 50.0):
        runs, orders = [], []

        def execute(pending, order_for, jobs, on_outcome):
            for run in pending:
                runs.append(run)
                orders.append(order_for(run))
                probe, failed = run.stage == "probe", loss(run) is None
                own = value(run) if not probe else None if failed else 50.0
                measured = {"grad_cosine": [0.1, 0.2], "grad_norm": [1.0, 2.0]}
                costs = {"steps": 50 if probe else 480, "cost_steps": 20.0, "initialisation": measured}
                on_outcome(run, outcome(own, eval_loss=loss(run), **costs))

        monkeypatch.setattr(runner, "execute", execute)
        return tuning.tune(Study(RECIPE, made, tmp_path, (), {})), runs, orders

    return run


def _half(run):
    """Loss that is best for one group with half the strength, with a spread over the seeds that all share."""
    groups, _, strength = run.arm.partition("-")
    better = 0.2 * (groups == "model") + 0.1 * (strength in ("0.5", "0.75")) + 0.05 * (strength == "0.5")
    return 2.0 + 0.3 * run.seed - better


def test_each_round_halves_the_candidates_and_keeps_the_recipes_own(search):
    made = plan()
    tuned, runs, orders = search(made, _half, lambda run: 50.0 + (run.arm != "own") + run.seed % 3)
    probes = [run for run in runs if run.stage == "probe"]
    by_seed = [[run.arm for run in probes if run.seed == seed] for seed in range(3)]
    assert [len(arms) for arms in by_seed] == tuning.round_sizes(made) == [9, 5, 3]
    assert all(tuning.OWN.name in arms for arms in by_seed)
    assert set(by_seed[1]) == {"own", *(f"model-{strength}" for strength in (0.25, 0.5, 0.75, 1.5))}
    assert set(by_seed[2]) == {"own", "model-0.5", "model-0.75"}
    assert tuned.chosen.name == "model-0.5"
    assert tuned.difference.values == (1.0, 1.0, 1.0)
    assert tuned.word == "beats"
    judged = [run for run in runs if run.stage == "verdict"]
    assert {run.seed for run in judged} == set(range(FIRST_VERDICT_SEED, FIRST_VERDICT_SEED + 3))
    assert {run.arm for run in judged} == {"own", "model-0.5"}
    for order, run in zip(orders, runs, strict=True):
        probe = run.stage == "probe"
        assert order.recipe.data.eval_from_train is True or not probe
        assert order.cost_share == (0.1 if probe else 1.0)
    text = " ".join(tuning.sentences(tuned))
    assert "17 probes of 50 steps took 1,190 training steps, 340 of them for initialisations" in text
    assert "Chosen: groups model, strength 0.5. Loss 1.9500" in text
    assert "2.3000 with the recipe's own settings (mean of 3 seeds)" in text
    assert "On 3 fresh seeds and 500 steps it is better than the recipe's own settings (a gain of +1.00 ± 0.00" in text
    assert text.endswith(" points of accuracy, 90% paired interval).")


def test_what_is_best_by_itself_is_kept_and_not_judged(search):
    tuned, runs, _ = search(plan(), lambda run: 1.0 if run.arm == "own" else 2.0)
    assert tuned.chosen is tuning.OWN
    assert {run.stage for run in runs} == {"probe"}
    assert "No candidate does better" in " ".join(tuning.sentences(tuned))
    assert "nio_" not in tuning.settings_yaml(tuned).split("\n# ")[-1].split("\n", 1)[-1]


@pytest.mark.parametrize(("gain", "word"), [(-2.0, "worse"), (0.01, "undecided")])
def test_a_choice_that_is_not_surely_better_is_not_advised(search, gain, word):
    noise = {FIRST_VERDICT_SEED: 0.5, FIRST_VERDICT_SEED + 1: -0.5}
    tuned, _, _ = search(plan(), _half, lambda run: 50.0 + (run.arm != "own") * (gain + noise.get(run.seed, 0.0)))
    assert tuned.word == word
    assert "keep those" in " ".join(tuning.sentences(tuned))
    assert tuning.settings_yaml(tuned).endswith('\n# nio_groups: "model"\n# nio_strength: 0.5\n')


@pytest.mark.parametrize(("rise", "word"), [(-0.02, "beats"), (0.02, "worse"), (0.0, "undecided")])
def test_the_choice_is_judged_by_the_metric_of_the_recipe(search, rise, word, monkeypatch):
    monkeypatch.setitem(METRICS, IMAGE_CLASSIFICATION, LOSS)
    noise = {FIRST_VERDICT_SEED: 0.001, FIRST_VERDICT_SEED + 1: -0.001}
    tuned, _, _ = search(plan(), _half, lambda run: 2.5 + (run.arm != "own") * (rise + noise.get(run.seed, 0.0)))
    assert tuned.word == word
    assert tuned.difference.mean == pytest.approx(-rise)
    # Half width of noise 0.001, -0.001, 0: 2.919986 * 0.001 / sqrt(3) = 0.0017.
    assert re.search(
        rf"\(a gain of [+-]{abs(rise):.4f} ± 0\.0017 nats, 90% paired interval\)", tuning.sentences(tuned)[-1]
    )
    report = tuning.make_report(tuned)
    assert "accura" not in (report.markdown() + json.dumps(report.numbers) + tuning.settings_yaml(tuned)).lower()


def test_probes_that_fail_come_last_and_failed_trainings_count_as_chance(search):
    def loss(run):
        return None if "additive" in run.arm else 2.0 - ("model" in run.arm)

    tuned, _, _ = search(plan(), loss, lambda run: 50.0 if run.arm == "own" else None)
    assert "model" in tuned.chosen.name
    assert all("additive" in arm.name for arm in tuned.candidates[-4:])
    assert tuned.difference.values == (100 / 10 - 50.0,) * 3


def test_probes_that_all_fail_are_an_error(search):
    with pytest.raises(RunError, match="probes: every one failed"):
        search(plan(), lambda run: None)


def test_the_point_of_the_grid_that_the_recipe_has_is_not_tried_twice():
    own = RECIPE.training.to_nio_config()
    grid = ((own.groups, "model"), (own.strength, 0.5))
    assert len(tuning.make_candidates(RECIPE, *grid)) == 4
    named = RECIPE.replace({"nio_groups": {"positions": "position_embeddings"}})
    found = tuning.make_candidates(named, *grid)
    assert len(found) == 5
    assert {tuning.tuned_settings(arm)["nio_groups"] for arm in found[1:]} == {"additive", "model"}


def test_the_budget_ends_the_search(search, tmp_path):
    made = plan(verdict_seeds=0)
    recipes = Study(RECIPE, made, tmp_path, (), {}).recipes
    first = tuning.Search("recipe", made, {}, LOSS, 0.0).expected(made.arms, recipes)
    with pytest.raises(RecipeError, match=r"--budget: 400 training steps, where the first round takes up to"):
        search(plan(budget=400), _half)
    tuned, runs, _ = search(plan(verdict_seeds=0, budget=math.ceil(first)), _half)
    assert {run.seed for run in runs} == {0}
    assert tuned.rounds == 1
    assert "The budget ended the search after 1 of 3 rounds" in " ".join(tuning.sentences(tuned))
    assert "It was not judged" in " ".join(tuning.sentences(tuned))


def test_an_initialisation_that_costs_the_whole_training_is_refused(search):
    found = r"arm own, --steps: 10, where the initialisation takes up to \d+ .* of 10 lea"
    with pytest.raises(RecipeError, match=found):
        search(plan(probe_steps=10, steps=10), _half)


def test_the_cost_beforehand_is_that_of_all_candidates_and_the_report_before():
    recipe = RECIPE.replace({"nio_report_batches": 3, "per_device_train_batch_size": 32, "nio_strength": 1.0})
    assert recipe.training.nio_batch_size == 64
    assert most_steps(recipe.training) == 2 * (expected_cost(recipe.training.to_nio_config(), groups=2) or 0)
    # The scales are at most 100 = 2^6.6, so that 6.6 and its halves down to 0.42 may be tried.
    model = recipe.replace({"nio_groups": "model"}).training
    assert most_steps(model) == (1 + 5) * 3 * 2, "the report before, and one for each candidate"


def test_a_search_goes_on_where_it_was(search):
    _, first, _ = search(plan(seeds=1, verdict_seeds=0), _half)
    tuned, rest, _ = search(plan(), _half)
    assert len(first) == 9
    assert not set(first) & set(rest)
    assert tuned.rounds == 3
    assert search(plan(), _half)[1] == []


def test_what_a_search_writes(search, tmp_path):
    tuned, _, _ = search(plan(), _half, lambda run: 50.0 + (run.arm != "own"))
    tuning.make_report(tuned).publish(tmp_path, "tuning")
    names = ("tuned.yaml", "tuning.md", "tuning.json", "probes.png")
    assert all((tmp_path / name).stat().st_size > 0 for name in names)
    lines = (tmp_path / "tuned.yaml").read_text(encoding="utf-8").splitlines()
    options = [f"--{line.replace(': ', '=')}" for line in lines if not line.startswith("#")]
    again = load_recipe("vit-tiny/digits/nio", options).training
    assert (again.nio_groups, again.nio_strength) == ("model", 0.5)
    found = json.loads((tmp_path / "tuning.json").read_text(encoding="utf-8"))
    assert found["chosen"] == tuned.chosen.name
    rows = tuning.probe_table(tuned)[1]
    assert len(found["candidates"]) == len(rows) == 9
    assert rows[0][1:] == ("3", "1.9500", "-0.3500", "20.0", "0.1 -> 0.2", "1 -> 2")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--groups", ""], "--groups: none"),
        (["--groups", "model,block"], "--groups: model, block. Give at least one of additive, model, each once"),
        (["--strengths", ""], "--strengths: none. Give at least one"),
        (["--strengths", "0.5,0.50"], "--strengths: 0.5, 0.5. Give different ones above 0"),
        (["--strengths", "0"], "--strengths: 0. Give different ones above 0"),
        (["--seeds", "0"], "--seeds: 0"),
        (["--nio_search", "published"], "nio_search: published. Set nio_search to balance"),
        (["--verdict_seeds", "2"], "Give 3 or more to judge by, or --no_verdict"),
        (["--probe_steps", "200"], "--probe_steps: 200, of whole trainings of 100"),
        (["--probe_steps", "0"], "--probe_steps: 0"),
        (["--warmup_steps", "5"], "--warmup_steps: is decided by this command"),
        (["--nio_method", "lsuv"], "only NIO is tuned"),
        (["--budget", "100"], "--budget: 100 training steps, where the first round takes up to"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path, arguments, found):
    directory = tmp_path / "new"
    command = ["tune", "--steps", "100", "--output_dir", str(directory), *GRID, *SMALL, *arguments]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert found in " ".join(done.output.split())
    assert not (directory / RESULTS_NAME).exists()
