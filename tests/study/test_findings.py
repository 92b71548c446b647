"""Conclusions from runs, compared with numbers worked out by hand, for accuracy and evaluation loss."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from nio_hf.metrics import ACCURACY, LOSS
from nio_hf.study.arms import choose_arms
from nio_hf.study.compare import grid_table, make_report, sentences, verdict_table
from nio_hf.study.findings import Findings, Stability
from nio_hf.study.plan import FIRST_VERDICT_SEED
from tests.study.outcomes import findings, outcome, plan

HIGHEST = 128.0
UPSIDE_DOWN = dataclasses.replace(LOSS, margin=ACCURACY.margin, plateau=ACCURACY.plateau, digits=ACCURACY.digits)
"""A loss with the margins of accuracy."""
CHANCE = 10.0
NOISE = {
    "no_warmup": (0.125, -0.25, 0.0, 0.25, -0.125),
    "nio": (0.0, 0.25, 0.125, 0.0, 0.25),
    "gi_adam": (0.125, -0.125, 0.0, 0.125, 0.0),
    "nio_seeded": (6.0, -5.0, 1.0, 3.0, -4.0),
}
GAINS = {"no_warmup": -6.0, "warmup": 0.0, "nio": 3.0, "gi_adam": -0.125, "nio_seeded": 0.5}
BEST_RATES = {"no_warmup": 1e-3, "warmup": 2e-3, "nio": 4e-3, "gi_adam": 2e-3, "nio_seeded": 4e-3}


def _value(run):
    """Values in eighths, which subtract without rounding: each arm has its best rate and its noise, and some fail."""
    number = run.seed % FIRST_VERDICT_SEED
    if (run.arm, run.learning_rate, number) == ("no_warmup", 4e-3, 1) or (run.arm, run.seed) == ("nio_seeded", 1002):
        return None
    best = BEST_RATES[run.arm]
    too_high = 8.0 if run.learning_rate > best else 0.0
    far = 2.0 * abs(math.log2(run.learning_rate / best)) + too_high + (run.warmup_ratio == 0.3)
    return 60.0 + number + GAINS[run.arm] - far + NOISE.get(run.arm, (0.0,) * 5)[number]


@pytest.fixture(scope="module")
def both():
    """The findings of a comparison by accuracy, and of one by a loss from the same runs upside down."""
    rates = (1e-3, 2e-3, 4e-3)
    made = plan(arms=choose_arms(list(BEST_RATES)), learning_rates=rates, verdict_seeds=5)

    def mirrored(run):
        return None if (value := _value(run)) is None else HIGHEST - value

    return findings(made, _value, ACCURACY, CHANCE), findings(made, mirrored, UPSIDE_DOWN, HIGHEST - CHANCE)


def test_a_loss_chooses_the_same_settings_and_has_the_same_verdicts(both):
    right, mirrored = both
    for own, other in zip(right.chosen, mirrored.chosen, strict=True):
        assert other.point == own.point
        assert other.value == pytest.approx(HIGHEST - own.value)
    for arm in right.plan.arms:
        assert mirrored.stability(arm.name) == right.stability(arm.name)
    assert right.verdicts
    for own, other in zip(right.verdicts, mirrored.verdicts, strict=True):
        assert (other.arm, other.word, other.difference) == (own.arm, own.word, own.difference)
        assert other.value.mean == pytest.approx(HIGHEST - own.value.mean)
        assert other.value.half_width == pytest.approx(own.value.half_width)
    assert [row[5:] for row in verdict_table(mirrored)[1]] == [row[5:] for row in verdict_table(right)[1]]
    assert (mirrored.tested_gain, mirrored.gains, mirrored.shares) == (right.tested_gain, right.gains, right.shares)
    assert mirrored.no_warmup_loses
    said = sentences(right)
    assert any("points of accuracy" in sentence for sentence in said)
    assert sentences(mirrored) == [sentence.replace("points of accuracy", "nats") for sentence in said]


def test_the_page_is_the_one_that_is_stored(both):
    """Choices, stability, intervals, verdicts and sentences of the same runs stay the same in every version."""
    stored = Path(__file__).with_name("comparison.md").read_text(encoding="utf-8")
    assert make_report(both[0]).markdown() == stored


def test_of_equals_the_lowest_rate_and_the_shortest_warmup_are_chosen():
    found = findings(plan(), lambda run: 50.0, ACCURACY, CHANCE)
    points = [("no_warmup", 1e-3, 0.0), ("warmup", 1e-3, 0.1), ("nio", 1e-3, 0.0)]
    assert [choice.point for choice in found.chosen] == points


@pytest.mark.parametrize(
    ("metric", "values", "stable"),
    [
        (ACCURACY, (48.0, 50.0, 47.5, 46.0), Stability(4e-3, 8e-3)),
        (ACCURACY, (50.0, 50.0, None, 50.0), Stability(2e-3, 4e-3)),
        (ACCURACY, (None, None, None, None), Stability(None, 1e-3)),
        (ACCURACY, (50.0, 50.0, 50.0, 50.0), Stability(8e-3, None)),
        (LOSS, (2.3, 2.2, 2.29, 2.31), Stability(4e-3, 8e-3)),
    ],
)
def test_an_arm_is_stable_to_the_end_of_its_plateau(metric, values, stable):
    rates = (1e-3, 2e-3, 4e-3, 8e-3)
    by_rate = dict(zip(rates, values, strict=True))
    whole = 50.0 if metric is ACCURACY else 2.2

    def value(run):
        own = by_rate[run.learning_rate]
        return whole if own is None and run.seed != 2 else own

    found = findings(plan(learning_rates=rates), value, metric, CHANCE)
    assert found.stability("nio") == stable


def _by_hand(gain, tested):
    """Warmup gains on the seeds of the selection, and otherwise on fresh ones; NIO gains 0.2, 0.3, 0.1 over warmup."""

    def value(run):
        if run.stage == "selection":
            return {"no_warmup": 40.0, "warmup": 40.0 + gain + 0.1 * run.seed % 0.3, "nio": 41.0}[run.arm]
        own = {"no_warmup": 42.0 - tested, "warmup": 42.0, "nio": 42.2}[run.arm]
        return own + (0.0, 0.1, -0.1)[run.seed - FIRST_VERDICT_SEED] * (run.arm == "nio")

    return findings(plan(), value, ACCURACY, CHANCE)


def test_where_warmup_gains_nothing_there_is_no_verdict():
    """This holds even if warmup gained on the seeds of the selection."""
    found = _by_hand(gain=3.0, tested=-0.5)
    text = " ".join(sentences(found))
    assert "warmup (10%) gains most over no warmup on the seeds of the selection: +3" in text
    assert "Judged anew there, it gains -0.50 ± 0.00 points of accuracy" in text
    assert "these seeds do not tell whether it gains at all" in text
    assert "does not tell what replaces warmup" in text
    assert all(row[-1] == "-" for row in verdict_table(found)[1])


def test_the_verdict_says_the_difference_with_its_uncertainty():
    """Differences 0.2, 0.3, 0.1: mean 0.2, standard deviation 0.1, half width 2.919986 * 0.1 / sqrt(3) = 0.17."""
    found = _by_hand(gain=3.0, tested=2.0)
    text = " ".join(sentences(found))
    assert "Judged anew there, it gains +2.00" in text
    assert "stable up to learning rate 0.002 at least, while no warmup does not fail up to 0.002" in text
    assert "nio without warmup beats warmup: a gain of +0.20 ± 0.17 points of accuracy" in text
    assert "3 fresh paired seeds, Holm-corrected for 2 comparisons" in text
    assert [row[-1] for row in verdict_table(found)[1]] == ["worse", "-", "beats"]
    assert "images" not in text
    # sqrt(42.2 * 57.8 / 10000) = 0.494, times sqrt 2 = 0.698
    shared = " ".join(sentences(dataclasses.replace(found, evaluated=10_000)))
    assert "judged on the same 10,000 images" in shared
    assert "an accuracy of 42.2% has a standard error of 0.49 points, and a difference of up to 0.70" in shared


def test_what_an_initialisation_adds_is_held_against_the_same_training_without_it():
    points = {"no_warmup": 0.0, "warmup": 1.0, "nio": 2.0, "gi_adam": 4.0, "nio_seeded": 7.0, "slow": 5.5, "lsuv": -1.0}
    names = ["no_warmup", "warmup", "nio", "gi_adam", "nio_seeded", "lsuv", "radam"]
    made = plan(arms=choose_arms(names, ["slow=nio_seeded,nio_lr=0.01"]))
    found = findings(made, lambda run: 50.0 + 5 * (run.seed % 1000) + points.get(run.arm, 9.0), ACCURACY, CHANCE)
    assert {share.arm: (share.without, share.difference.mean) for share in found.shares} == {
        "nio": ("no_warmup", pytest.approx(2.0)),
        "nio_seeded": ("gi_adam", pytest.approx(3.0)),
        "slow": ("gi_adam", pytest.approx(1.5)),
        "lsuv": ("no_warmup", pytest.approx(-1.0)),
    }
    said = " ".join(sentences(found))
    assert "The initialisation of nio_seeded gains +3.00 ± 0.00 points of accuracy over gi_adam" in said


def test_an_interval_is_wider_where_more_arms_are_held_against_warmup():
    """Differences 0.2, 0.3, 0.1 once, and beside them two arms that do not differ significantly from warmup."""

    def value(run):
        number = run.seed % 1000
        return 50.0 + {"nio": (0.2, 0.3, 0.1)[number], "warmup": 0.0}.get(run.arm, (0.2, -0.3, 0.2)[number])

    def differences(*more):
        made = plan(arms=choose_arms(["no_warmup", "warmup", "nio", *more]))
        return {verdict.arm: verdict.difference for verdict in findings(made, value, ACCURACY, CHANCE).verdicts}

    alone, among = differences(), differences("lsuv", "radam")
    assert alone["nio"].p == pytest.approx(2 * 0.0741799, rel=1e-4)
    assert among["nio"].p == pytest.approx(4 * 0.0741799, rel=1e-4)
    assert among["nio"].half_width > alone["nio"].half_width
    assert among["warmup"].mean == 0


def test_there_is_no_verdict_while_runs_are_missing():
    made = plan()
    known = {run: outcome(50.0) for run in made.selection()}
    found = Findings("recipe", made, known, ACCURACY, CHANCE)
    assert (len(found.chosen), found.verdicts, found.shares, found.tested_gain) == (3, [], [], None)
    assert sentences(found)[-1] == "The verdict is still to come."
    del known[made.selection()[0]]
    assert Findings("recipe", made, known, ACCURACY, CHANCE).chosen == []
    assert "the grid is not complete" in sentences(Findings("recipe", made, known, ACCURACY, CHANCE))[0]


def test_nothing_that_is_said_or_written_of_a_loss_speaks_of_accuracy(tmp_path):
    """NIO is 0.006 nats behind warmup, and no warmup 0.3."""

    def value(run):
        own = {"no_warmup": 2.8, "warmup": 2.5, "nio": 2.506}[run.arm] + 0.01 * (run.warmup_ratio == 0.3)
        return own + 0.001 * (run.seed - 1001) * ((run.arm, run.stage) == ("nio", "verdict"))

    found = findings(plan(), value, LOSS, LOSS.worst(1000), evaluated=10_000)
    text = " ".join(sentences(found))
    # Differences -0.005, -0.006, -0.007, whose half width is 2.919986 * 0.001 / sqrt(3) = 0.0017.
    assert "nio without warmup matches warmup to 0.01 nats: a gain of -0.0060 ± 0.0017 nats" in text
    assert "The initialisation of nio gains +0.2940 ± 0.0017 nats over no_warmup" in text
    assert "images" not in text
    assert grid_table(found)[1][2][1] == "2.506 ± 0.000"
    assert verdict_table(found)[1][2][4:6] == ("2.5060 ± 0.0017", "-0.0060 ± 0.0017")
    make_report(found).publish(tmp_path, "comparison")
    page = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "## Evaluation loss (nats) by learning rate" in page
    assert "| cost (steps) | evaluation loss (nats) | gain over warmup |" in page
    numbers = (tmp_path / "comparison.json").read_text(encoding="utf-8")
    assert json.loads(numbers)["metric"]["lower_is_better"] is True
    assert "accura" not in (page + numbers).lower()
    assert "points" not in page
    assert len([file for file in tmp_path.iterdir() if file.stat().st_size > 0]) == 4
