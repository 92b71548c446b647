"""A comparison by the evaluation loss: it concludes what one by accuracy does from the same runs upside down."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nio_hf.cli.main import app
from nio_hf.comparison import analysis
from nio_hf.comparison.analysis import Stability
from nio_hf.comparison.arms import choose_arms
from nio_hf.comparison.findings import Findings
from nio_hf.comparison.plan import Choice, Plan
from nio_hf.comparison.report import grid_rows, sentences, verdict_rows, write_report
from nio_hf.metrics import ACCURACY, IMAGE_CLASSIFICATION, LOSS, METRICS, Metric
from nio_hf.trials import bench as bench_module
from nio_hf.trials.results import Outcome
from nio_hf.trials.run import FIRST_VERDICT_SEED, Run
from tests.comparison.outcomes import outcome, outcomes, plan

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


def _value(run: Run) -> float | None:
    """Values in eighths, which subtract without rounding: each arm has its best rate and its noise, and some fail."""
    number = run.seed % FIRST_VERDICT_SEED
    if (run.arm, run.learning_rate, number) == ("no_warmup", 4e-3, 1) or (run.arm, run.seed) == ("nio_seeded", 1002):
        return None
    best = {"no_warmup": 1e-3, "warmup": 2e-3, "gi_adam": 2e-3}.get(run.arm, 4e-3)
    too_high = 8.0 if run.learning_rate > best else 0.0
    far = 2.0 * abs(math.log2(run.learning_rate / best)) + too_high + (run.warmup_ratio == 0.3)
    return 60.0 + number + GAINS[run.arm] - far + NOISE.get(run.arm, (0.0,) * 5)[number]


def _upside_down(run: Run) -> float | None:
    value = _value(run)
    return None if value is None else HIGHEST - value


def _findings(metric: Metric, worst: float) -> Findings:
    """The findings of a comparison of which every run is known."""
    made = plan(
        arms=choose_arms(["no_warmup", "warmup", "nio", "gi_adam", "nio_seeded"]),
        learning_rates=(1e-3, 2e-3, 4e-3),
        verdict_seeds=5,
    )
    value = _upside_down if metric.lower_is_better else _value
    known = outcomes(made, value)
    grid = analysis.cells(made, known, worst)
    most = analysis.largest_gain(analysis.warmup_gains(grid, metric))
    assert most is not None
    runs = made.verdict_runs(analysis.choose(grid, metric))
    runs += made.gain_runs(most.learning_rate, most.warmup_ratio)
    return Findings.of("recipe", made, {**known, **outcomes(made, value, runs)}, metric, worst)


@pytest.fixture(scope="module")
def right() -> Findings:
    return _findings(ACCURACY, CHANCE)


@pytest.fixture(scope="module")
def mirrored() -> Findings:
    return _findings(UPSIDE_DOWN, HIGHEST - CHANCE)


def test_the_same_settings_are_chosen(right: Findings, mirrored: Findings) -> None:
    assert {choice.arm: choice.learning_rate for choice in right.chosen} == {
        "no_warmup": 1e-3,
        "warmup": 2e-3,
        "nio": 4e-3,
        "gi_adam": 2e-3,
        "nio_seeded": 4e-3,
    }
    for own, other in zip(right.chosen, mirrored.chosen, strict=True):
        assert dataclasses.replace(other, value=own.value) == own
        assert other.value == pytest.approx(HIGHEST - own.value)


def test_arms_bear_the_same_learning_rates(right: Findings, mirrored: Findings) -> None:
    found = {arm.name: right.stability(arm.name) for arm in right.plan.arms}
    assert found["no_warmup"] == Stability(1e-3, 2e-3)
    assert found["nio"] == Stability(4e-3, None)
    assert {arm.name: mirrored.stability(arm.name) for arm in mirrored.plan.arms} == found


def test_the_verdicts_have_the_same_intervals_and_words(right: Findings, mirrored: Findings) -> None:
    assert [verdict.word for verdict in right.verdicts] == ["worse", "matches", "beats", "matches", "undecided"]
    for own, other in zip(right.verdicts, mirrored.verdicts, strict=True):
        assert (other.arm, other.word, other.difference) == (own.arm, own.word, own.difference)
        assert other.value.mean == pytest.approx(HIGHEST - own.value.mean)
        assert other.value.half_width == pytest.approx(own.value.half_width)
    assert [row[5:] for row in verdict_rows(mirrored)] == [row[5:] for row in verdict_rows(right)]


def test_warmup_and_initialisations_gain_the_same(right: Findings, mirrored: Findings) -> None:
    assert right.tested_gain is not None
    assert right.tested_gain.gain.mean > 0
    assert mirrored.tested_gain == right.tested_gain
    assert mirrored.gains == right.gains
    assert mirrored.no_warmup_loses
    assert [share.arm for share in right.shares] == ["nio", "nio_seeded"]
    assert mirrored.shares == right.shares


def test_the_sentences_are_the_same_in_nats(right: Findings, mirrored: Findings) -> None:
    said = sentences(right)
    assert any("points of accuracy" in sentence for sentence in said)
    assert sentences(mirrored) == [sentence.replace("points of accuracy", "nats") for sentence in said]


def test_a_failed_run_counts_as_a_model_that_knows_nothing() -> None:
    made = plan()
    known = outcomes(made, lambda run: None if run.seed == 1 else 2.0)
    findings = Findings.of("recipe", made, known, LOSS, LOSS.worst(1000))
    assert [cell.value for cell in findings.cells] == pytest.approx([(2 + math.log(1000) + 2) / 3] * 8)


def test_an_arm_is_stable_up_to_a_tenth_of_a_nat_above_its_best_loss() -> None:
    made = plan(learning_rates=(1e-3, 2e-3, 4e-3, 8e-3))
    losses = {1e-3: 2.3, 2e-3: 2.2, 4e-3: 2.29, 8e-3: 2.31}
    known = outcomes(made, lambda run: losses[run.learning_rate])
    findings = Findings.of("recipe", made, known, LOSS, LOSS.worst(1000))
    assert findings.stability("nio") == Stability(4e-3, 8e-3)


def _by_loss(made: Plan, worst: float) -> Findings:
    """NIO is 0.006 nats behind warmup, and no warmup 0.3."""
    losses = {"no_warmup": 2.8, "warmup": 2.5, "nio": 2.506}
    known = outcomes(made, lambda run: losses[run.arm] + 0.01 * run.warmup_ratio)
    runs = made.verdict_runs([Choice(arm.name, 1e-3, made.ratios(arm)[0], 0.0) for arm in made.arms])
    known |= {run: outcome(losses[run.arm] + 0.001 * (run.arm == "nio") * (run.seed - 1001)) for run in runs}
    return Findings.of("recipe", made, known, LOSS, worst, evaluated=10_000)


def test_nothing_that_is_said_or_written_of_a_loss_speaks_of_accuracy(tmp_path: Path) -> None:
    findings = _by_loss(plan(), LOSS.worst(1000))
    text = " ".join(sentences(findings))
    # Differences -0.005, -0.006, -0.007, whose half width is 2.919986 * 0.001 / sqrt(3) = 0.0017.
    assert "nio without warmup matches warmup to 0.01 nats: a gain of -0.0060 ± 0.0017 nats" in text
    assert "The initialisation of nio gains +0.2940 ± 0.0017 nats over no_warmup" in text
    assert "images" not in text
    assert {verdict.arm: verdict.word for verdict in findings.verdicts if verdict.arm != "warmup"} == {
        "no_warmup": "worse",
        "nio": "matches",
    }
    written = write_report(findings, tmp_path)
    page = written["Table"].read_text(encoding="utf-8")
    assert "## Evaluation loss (nats) by learning rate" in page
    assert "| cost (steps) | evaluation loss (nats) | gain over warmup |" in page
    assert grid_rows(findings)[2][1] == "2.506 ± 0.000"
    assert {row[0]: row[4:6] for row in verdict_rows(findings)}["nio"] == ("2.5060 ± 0.0017", "-0.0060 ± 0.0017")
    numbers = written["Numbers"].read_text(encoding="utf-8")
    assert json.loads(numbers)["metric"]["lower_is_better"] is True
    assert "accura" not in (page + numbers).lower()
    assert "points" not in page
    assert all(file.stat().st_size > 0 for file in written.values())


@pytest.mark.parametrize(("metric", "failed"), [(ACCURACY, 100 / 10), (LOSS, math.log(10))])
def test_the_command_judges_by_the_metric_of_the_recipe(
    metric: Metric, failed: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(pending: Sequence[Run], order_for: Any, jobs: int, on_outcome: Any, on_start: Any) -> None:
        for run in pending:
            on_start(run)
            on_outcome(run, _made_up(run))

    monkeypatch.setitem(METRICS, IMAGE_CLASSIFICATION, metric)
    monkeypatch.setattr(bench_module, "execute", execute)
    rates = ["--learning_rates", "1e-3,2e-3"]
    done = CliRunner().invoke(
        app, ["compare", "vit-tiny/digits/nio", "--steps", "100", *rates, "--output_dir", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    output = " ".join(done.output.split())
    assert f"{metric.heading} by learning rate" in output
    assert f"no_warmup-lr0.001-s0: {metric.name} {metric.text(0.75)}" in output
    assert ("accura" in output.lower()) == metric.is_share
    found = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    values = {(cell["arm"], cell["learning_rate"]): cell["value"] for cell in found["cells"]}
    assert values["nio", 2e-3] == pytest.approx(failed)
    higher = {choice["arm"] for choice in found["chosen"] if choice["learning_rate"] == 2e-3}
    assert higher == ({"warmup"} if metric.lower_is_better else {"no_warmup", "nio"})


def _made_up(run: Run) -> Outcome:
    """Values that rise with the rate, and fall with it where there is warmup; NIO fails at the higher rate."""
    if (run.arm, run.learning_rate) == ("nio", 2e-3):
        return outcome(None)
    rise = 250 * (run.learning_rate - 1e-3) * (-1 if run.arm == "warmup" else 1)
    return outcome(0.75 + rise + 0.125 * run.seed % 1)
