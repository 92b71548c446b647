"""The study of warmup: its comparisons can be carried out."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from benchmarks.warmup_free import study, width
from benchmarks.warmup_free.differences import table
from benchmarks.warmup_free.first_steps import COLUMNS, draw, read_comparisons, read_runs, rows
from benchmarks.warmup_free.study import (
    BEST,
    BEST_SEEDED,
    COMPARISONS,
    FOLDER,
    RESULTS,
    Comparison,
    carry_out,
    take_runs,
)
from nio_hf.comparison.arms import choose_arms
from nio_hf.comparison.plan import Plan
from nio_hf.console import USAGE_ERROR
from nio_hf.report.tables import markdown_table
from nio_hf.trials.bench import Bench
from nio_hf.trials.results import RESULTS_NAME, Outcome, Results
from nio_hf.trials.run import Run

SIDE_BY_SIDE = [
    (["vit-variants", "swin-variants"], 1e-3, "nio"),
    (["digits"], 2e-3, "no_warmup"),
    *(([f"{model}-controls"], float(rate), "nio") for model, rate in BEST.items()),
    *(([f"{model}-seeded"], float(rate), "nio_seeded") for model, rate in BEST_SEEDED.items()),
]
"""(comparisons, learning rate, arm that the others are held against) of tables of the page."""


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


def _write_grid(directory: Path, made: Comparison) -> Path:
    """The runs of the grid of a comparison, as the present arms make them."""
    directory.mkdir(parents=True)
    outcome = dataclasses.asdict(Outcome.failure("not carried out", 0.0))
    records: list[dict[str, Any]] = [{"format": 1, "task": {}}]
    for trial in made.plan().trials(made.plan().grid()):
        run = dataclasses.asdict(trial.run)
        records.append({"run": run, "settings": dict(trial.arm.settings), "outcome": outcome})
    target = directory / RESULTS_NAME
    target.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return target


@pytest.mark.parametrize("name", [name for name, made in COMPARISONS.items() if made.basis])
def test_a_comparison_takes_the_runs_that_it_shares_with_its_basis(name: str, tmp_path: Path) -> None:
    made = COMPARISONS[name]
    assert made.basis is not None
    basis = _write_grid(tmp_path / "basis", COMPARISONS[made.basis])
    take_runs(made, basis, tmp_path / "own" / RESULTS_NAME)
    results = Results(tmp_path / "own", json.loads(basis.read_text().splitlines()[0])["task"])
    arms = choose_arms(made.arms.split(","), [f"{arm}={text}" for arm, text in made.definitions.items()])
    rates = _numbers(made.learning_rates)
    plan = Plan(arms, rates, _numbers(made.warmup_ratios), 1, 0, made.steps)
    lines = (tmp_path / "own" / RESULTS_NAME).read_text().splitlines()[1:]
    assert {Run(**json.loads(line)["run"]) for line in lines} <= {
        dataclasses.replace(run, seed=seed) for run in plan.grid() for seed in range(3)
    }
    known = {(run.arm, run.learning_rate) for run in plan.grid() if results.get(run, plan.arm(run.arm)) is not None}
    shared = {arm.name for arm in arms} & set(COMPARISONS[made.basis].arms.split(","))
    assert known == {(arm, rate) for arm in shared for rate in rates}
    other_rate = next(rate for rate in _numbers(COMPARISONS[made.basis].learning_rates) if rate not in rates)
    left_out = Run("selection", arms[0].name, other_rate, 0.0, 0)
    assert results.get(left_out, arms[0]) is None


def _write_images(file: Path) -> None:
    """One image of each of ten classes."""
    images = [Image.fromarray(np.full((32, 32, 3), 20 * label, np.uint8)) for label in range(10)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(10))
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"image": images, "label": list(range(10))}, features=features).to_parquet(file)


@pytest.mark.parametrize("name", ["vit", "swin-controls"])
def test_runs_of_former_settings_are_refused_and_stay_as_they_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        _write_images(tmp_path / "data" / "cifar10" / f"{split}.parquet")
    monkeypatch.setattr(study, "OUTPUTS", tmp_path / "outputs")
    before = {file: file.read_bytes() for file in (RESULTS / name).iterdir()}
    assert carry_out(name, tmp_path / "data", jobs=1) == USAGE_ERROR
    message = capsys.readouterr().err
    assert "nio_gamma_relative is 2.0 there, None here" in message
    assert "nio_search is None there, 'scan' here" in message
    assert {file: file.read_bytes() for file in (RESULTS / name).iterdir()} == before


def _write_runs(directory: Path, accuracies: dict[str, list[float | None]], scales: dict[str, list[float]]) -> None:
    directory.mkdir()
    lines = ["{}"]
    for arm, values in accuracies.items():
        for seed, accuracy in enumerate(values):
            run = {"stage": "selection", "arm": arm, "learning_rate": 1e-3, "warmup_ratio": 0.0, "seed": seed}
            initialisation = {"scales": scales[arm]} if arm in scales else None
            outcome = {"accuracy": accuracy, "cost_steps": 8.0 if initialisation else 0.0}
            lines.append(json.dumps({"run": run, "outcome": {**outcome, "initialisation": initialisation}}))
    (directory / RESULTS_NAME).write_text("\n".join(lines) + "\n")


def test_arms_are_held_against_one_of_them_seed_by_seed(tmp_path: Path) -> None:
    first: dict[str, list[float | None]] = {"no_warmup": [30.0, 40.0], "nio": [31.0, 43.0], "broken": [50.0, None]}
    _write_runs(tmp_path / "a", first, {"nio": [0.5, 2.0]})
    _write_runs(tmp_path / "b", {"no_warmup": [10.0, 12.0]}, {})
    held = table(read_comparisons(["a", "b"], tmp_path), 1e-3, "no_warmup")
    lines = [line.strip("| ").split(" | ") for line in held.splitlines()]
    by_arm = {cells[0]: cells[1:] for cells in lines}
    # differences 1 and 3: mean 2, sd sqrt 2, half width t(0.95, 1) sd / sqrt 2 = 6.314
    assert by_arm["nio"] == ["37.0", "+2.00 ± 6.31", "0.50 to 2.00", "8", "-", "-", "-", "-"]
    assert by_arm["no_warmup"] == ["35.0", "-", "-", "-", "11.0", "-", "-", "-"]
    assert by_arm["broken"][0] == "1 of 2 failed"


def _outcome(angles: list[float], accuracy: float, error: str | None = None) -> dict[str, Any]:
    moved = {"angular_update": angles, "relative_update": angles, "output_change": angles}
    losses = [2.0] * 10 + [1.0]
    grad_norms = [3.0] * 11
    return {"accuracy": accuracy, "error": error, "losses": losses, "grad_norms": grad_norms, "diagnostics": moved}


def test_the_first_steps_are_means_over_seeds_that_did_not_fail(tmp_path: Path) -> None:
    outcomes = [_outcome([0.002] * 10 + [9.0], 30.0), _outcome([0.004] * 11, 40.0), _outcome([math.nan] * 11, 50.0)]
    outcomes.append(_outcome([8.0] * 11, 0.0, "diverged"))
    (tmp_path / "a").mkdir()
    run = {"stage": "selection", "arm": "warmup", "learning_rate": 1e-3, "warmup_ratio": 0.1}
    records = [{"run": {**run, "seed": seed}, "outcome": outcome} for seed, outcome in enumerate(outcomes)]
    records.append({"run": {**run, "stage": "verdict", "seed": 1000}, "outcome": _outcome([7.0] * 11, 99.0)})
    (tmp_path / "a" / RESULTS_NAME).write_text("\n".join(["{}", *map(json.dumps, records)]) + "\n")
    row = ("warmup 10%", "0.001", "0.0030", "3.0", "0.003", "3.00", "1.000", "1.909", "40.0")
    assert rows(read_runs(tmp_path / "a"), [1e-3]) == [row]
    assert rows(read_runs(tmp_path / "a"), [2e-3]) == []
    draw(read_comparisons(["a"], tmp_path), tmp_path / "angles.png")
    assert (tmp_path / "angles.png").read_bytes().startswith(b"\x89PNG")


def _expected_on_the_page() -> list[str]:
    """The tables and verdicts that follow from the results that are kept."""
    parts = []
    for name, made in COMPARISONS.items():
        report = RESULTS / name / "comparison.md"
        if made.verdict_seeds and report.is_file():
            blocks = report.read_text().split("\n\n")
            tables = [block for block in blocks if block.startswith("| ")]
            verdict = next(block for block in blocks if block.startswith("- "))
            parts += [*tables, verdict]
    for names, rate, reference in SIDE_BY_SIDE:
        if all((RESULTS / name / "comparison.md").is_file() for name in names):
            parts.append(table(read_comparisons(names, RESULTS), rate, reference))
    parts += [markdown_table(COLUMNS, rows(read_runs(RESULTS / name), [1e-3])) for name in ("vit", "swin")]
    searches = [json.loads((RESULTS / f"tune-{name}" / "tuning.json").read_text()) for name in ("vit", "swin")]
    parts += ["\n".join(f"- {sentence}" for sentence in found["words"]) for found in searches]
    widths = json.loads((RESULTS / "width.json").read_text())["widths"]
    parts.append(markdown_table(width.COLUMNS, [width.row(int(each), found) for each, found in widths.items()]))
    return parts


def test_the_page_says_what_the_results_say() -> None:
    page = (FOLDER / "README.md").read_text()
    expected = _expected_on_the_page()
    assert expected
    assert [part for part in expected if part not in page] == []


def test_the_readme_says_what_the_verdicts_say() -> None:
    readme = (FOLDER.parents[1] / "README.md").read_text()
    verdicts = [
        {
            verdict["arm"]: f"{verdict['difference']['mean']:+.2f} ± {verdict['difference']['half_width']:.2f}"
            for verdict in json.loads((RESULTS / name / "comparison.json").read_text())["verdicts"]
        }
        for name in ("vit", "swin")
    ]
    for arm in ("no_warmup", "nio", "gi_adam", "nio_seeded"):
        assert f"| `{arm}` | {verdicts[0][arm]} | {verdicts[1][arm]} |" in readme
