"""What follows from runs, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from nio_hf.comparison import analysis
from nio_hf.comparison.analysis import Stability
from nio_hf.comparison.arms import choose_arms
from nio_hf.comparison.findings import Findings
from nio_hf.comparison.report import sentences, verdict_rows
from nio_hf.metrics import ACCURACY
from nio_hf.trials.interval import Interval, interval
from nio_hf.trials.run import Run
from tests.comparison.outcomes import outcome, outcomes, plan

CHANCE = 10.0


def test_the_interval_is_that_of_students_t() -> None:
    """Mean 2, standard deviation 1, n = 3; the 95% quantile of t with 2 degrees of freedom is 2.91999 (tables)."""
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert math.isclose(found.half_width, 2.919986 / math.sqrt(3), rel_tol=1e-6)
    assert math.isinf(interval([1.0]).half_width)


@pytest.mark.parametrize(
    ("mean", "half_width", "word"),
    [
        (1.0, 0.9, "beats"),
        (0.0, 0.4, "matches"),
        (0.5, 1.0, "undecided"),
        (0.5, 0.5, "matches"),
        (-0.4, 0.05, "matches"),
        (-1.0, 0.4, "worse"),
        (-1.0, 0.6, "undecided"),
        (5.0, math.inf, "undecided"),
    ],
)
def test_the_words_of_a_verdict(mean: float, half_width: float, word: str) -> None:
    assert analysis.judge(Interval(mean, half_width, ()), ACCURACY.margin) == word


def test_a_failed_run_counts_as_chance() -> None:
    made = plan()
    found = analysis.cells(made, outcomes(made, lambda run: None if run.seed == 1 else 40.0), CHANCE)
    assert all(cell.value == pytest.approx((40 + 10 + 40) / 3) for cell in found)
    assert all(cell.failed == 1 for cell in found)


def test_the_choice_is_the_best_mean_and_of_equals_the_lowest_rate() -> None:
    made = plan()

    def accuracy(run: Run) -> float:
        best = {"no_warmup": 1e-3, "warmup": 2e-3}.get(run.arm)
        return 50.0 + (run.learning_rate == best) + 0.5 * (run.warmup_ratio == 0.3)

    chosen = {
        choice.arm: choice
        for choice in analysis.choose(analysis.cells(made, outcomes(made, accuracy), CHANCE), ACCURACY)
    }
    assert (chosen["warmup"].learning_rate, chosen["warmup"].warmup_ratio) == (2e-3, 0.3)
    assert chosen["no_warmup"].learning_rate == 1e-3
    assert chosen["nio"].learning_rate == 1e-3


def test_an_arm_is_stable_to_the_end_of_its_plateau() -> None:
    made = plan(learning_rates=(1e-3, 2e-3, 4e-3, 8e-3))
    accuracies = {1e-3: 48.0, 2e-3: 50.0, 4e-3: 47.5, 8e-3: 46.0}
    found = analysis.cells(made, outcomes(made, lambda run: accuracies[run.learning_rate]), CHANCE)
    assert analysis.stability(found, "nio", ACCURACY) == Stability(4e-3, 8e-3)
    failing = outcomes(made, lambda run: None if run.learning_rate == 4e-3 and run.seed == 2 else 50.0)
    assert analysis.stability(analysis.cells(made, failing, CHANCE), "nio", ACCURACY) == Stability(2e-3, 4e-3)
    none = analysis.cells(made, outcomes(made, lambda run: None), CHANCE)
    assert analysis.stability(none, "nio", ACCURACY) == Stability(None, 1e-3)
    flat = analysis.cells(made, outcomes(made, lambda run: 50.0), CHANCE)
    assert analysis.stability(flat, "nio", ACCURACY) == Stability(8e-3, None)


def _findings(gain: float, tested: float, noise: tuple[float, ...] = (0.0, 0.1, -0.1)) -> Findings:
    made = plan(arms=choose_arms(["no_warmup", "warmup", "nio"]))

    def accuracy(run: Run) -> float:
        by_arm = {"no_warmup": 40.0, "warmup": 40.0 + gain + 0.1 * run.seed % 0.3, "nio": 41.0}
        return by_arm[run.arm]

    known = outcomes(made, accuracy)
    chosen = analysis.choose(analysis.cells(made, known, CHANCE), ACCURACY)
    for run in made.verdict_runs(chosen):
        offset = noise[run.seed - 1000] if run.arm == "nio" else 0.0
        known[run] = outcome({"no_warmup": 42.0 - tested, "warmup": 42.0, "nio": 42.2}[run.arm] + offset)
    most = analysis.largest_gain(analysis.warmup_gains(analysis.cells(made, known, CHANCE), ACCURACY))
    assert most is not None
    for run in made.gain_runs(most.learning_rate, most.warmup_ratio):
        known.setdefault(run, outcome(42.0 - tested * (run.arm == "no_warmup") + 0.1 * (run.seed % 2)))
    return Findings.of("recipe", made, known, ACCURACY, CHANCE)


def test_where_warmup_gains_nothing_there_is_no_verdict() -> None:
    """Even where it gained on the seeds that rate and length were chosen by."""
    findings = _findings(gain=3.0, tested=-0.5)
    text = " ".join(sentences(findings))
    assert "warmup (10%) gains most over no warmup on the seeds of the selection: +3" in text
    assert re.search(r"There warmup gains -0\.5.*: these seeds do not tell whether it gains at all", text)
    assert "nothing is said about what replaces warmup" in text
    assert all(row[-1] == "-" for row in verdict_rows(findings))


def test_the_verdict_says_the_difference_with_its_uncertainty() -> None:
    """Differences 0.2, 0.3, 0.1: mean 0.2, standard deviation 0.1, half width 2.919986 * 0.1 / sqrt(3) = 0.17."""
    findings = _findings(gain=3.0, tested=2.0)
    text = " ".join(sentences(findings))
    assert "No warmup loses: there warmup gains +2.00" in text
    assert "stable up to learning rate 0.002 at least, while no warmup does not fail up to 0.002" in text
    assert "nio without warmup beats warmup: a gain of +0.20 ± 0.17 points of accuracy" in text
    assert "3 fresh paired seeds" in text
    assert {row[0]: row[-1] for row in verdict_rows(findings)} == {
        "no_warmup": "worse",
        "warmup": "-",
        "nio": "beats",
    }


def test_differences_are_paired_by_seed() -> None:
    """Noise that both arms share does not widen the interval."""
    made = plan()
    known = outcomes(made, lambda run: 50.0 + (run.arm == "warmup"))
    chosen = analysis.choose(analysis.cells(made, known, CHANCE), ACCURACY)
    for run in made.verdict_runs(chosen):
        known[run] = outcome(50.0 + 5 * (run.seed - 1000) + (run.arm == "nio"))
    verdict = next(v for v in analysis.verdicts(made, chosen, known, ACCURACY, CHANCE) if v.arm == "nio")
    assert verdict.difference.mean == pytest.approx(1.0)
    assert verdict.difference.half_width == pytest.approx(0.0)
    assert verdict.value.half_width > 5


def test_what_an_initialisation_adds_is_held_against_the_same_training_without_it() -> None:
    arms = choose_arms(
        ["no_warmup", "warmup", "nio", "gi_adam", "nio_seeded", "lsuv", "radam"], ["slow=nio_seeded,nio_lr=0.01"]
    )
    made = plan(arms=arms)
    points = {"no_warmup": 0.0, "warmup": 1.0, "nio": 2.0, "gi_adam": 4.0, "nio_seeded": 7.0, "slow": 5.5, "lsuv": -1.0}
    known = outcomes(made, lambda run: 50.0)
    chosen = analysis.choose(analysis.cells(made, known, CHANCE), ACCURACY)
    for run in made.verdict_runs(chosen):
        known[run] = outcome(50.0 + 5 * (run.seed - 1000) + points.get(run.arm, 9.0))
    found = {
        share.arm: (share.without, share.difference.mean)
        for share in analysis.shares(made, chosen, known, ACCURACY, CHANCE)
    }
    assert found == {
        "nio": ("no_warmup", pytest.approx(2.0)),
        "nio_seeded": ("gi_adam", pytest.approx(3.0)),
        "slow": ("gi_adam", pytest.approx(1.5)),
        "lsuv": ("no_warmup", pytest.approx(-1.0)),
    }
    text = " ".join(sentences(Findings.of("recipe", made, known, ACCURACY, CHANCE)))
    assert "The initialisation of nio_seeded gains +3.00 ± 0.00 points of accuracy over gi_adam" in text


def test_an_interval_is_wider_where_more_arms_are_held_against_warmup() -> None:
    """Differences 0.2, 0.3, 0.1 once, and beside them two other arms that are not told from warmup."""
    few, many = (plan(arms=choose_arms(["no_warmup", "warmup", "nio", *more])) for more in ([], ["lsuv", "radam"]))
    found = []
    for made in (few, many):
        known = outcomes(made, lambda run: 50.0)
        chosen = analysis.choose(analysis.cells(made, known, CHANCE), ACCURACY)
        for run in made.verdict_runs(chosen):
            number = run.seed - 1000
            own = {"nio": (0.2, 0.3, 0.1)[number], "warmup": 0.0}.get(run.arm, (0.2, -0.3, 0.2)[number])
            known[run] = outcome(50.0 + own)
        found.append({v.arm: v.difference for v in analysis.verdicts(made, chosen, known, ACCURACY, CHANCE)})
    alone, among_others = (differences["nio"] for differences in found)
    assert alone.p == pytest.approx(2 * 0.0741799, rel=1e-4)
    assert among_others.p == pytest.approx(4 * 0.0741799, rel=1e-4)
    assert among_others.half_width > alone.half_width
    assert found[1]["warmup"].mean == 0


def test_the_uncertainty_of_the_test_images_is_said_where_all_runs_share_them() -> None:
    findings = _findings(gain=3.0, tested=2.0)
    assert not any("images" in sentence for sentence in sentences(findings))
    shared = dataclasses.replace(findings, evaluated=10_000)
    text = " ".join(sentences(shared))
    # sqrt(42.2 * 57.8 / 10000) = 0.494, times sqrt 2 = 0.698
    assert "judged on the same 10,000 images" in text
    assert "an accuracy of 42.2% has a standard error of 0.49 points, and a difference of up to 0.70" in text


def test_there_is_no_verdict_while_runs_are_missing() -> None:
    made = plan()
    known = outcomes(made, lambda run: 50.0)
    chosen = analysis.choose(analysis.cells(made, known, CHANCE), ACCURACY)
    assert analysis.verdicts(made, chosen, known, ACCURACY, CHANCE) == []
    del known[made.grid()[0]]
    findings = Findings.of("recipe", made, known, ACCURACY, CHANCE)
    assert findings.chosen == []
    assert "the grid is not through" in sentences(findings)[0]
