"""The committed results, the claims drawn from them, and a small run of the benchmark itself."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import cost_report
from benchmarks.accounting import counted
from benchmarks.cost import RUNS, count_run
from benchmarks.cost_report import ARITHMETIC_BOUNDS, RUN_BOUND, Claim, claims
from benchmarks.workloads import FIRST_PASS, JOINT, MODELS, PATHS, STUDY_MODELS, workload

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "cost-cpu"


def _committed():
    return [json.loads((RESULTS / f"{model}.json").read_text()) for model in MODELS]


def _committed_runs():
    return json.loads((RESULTS / f"{RUNS}.json").read_text())["runs"]


def test_every_claim_holds_in_the_committed_results():
    assert {run["model"] for run in _committed_runs()} == set(STUDY_MODELS)
    found = claims(_committed(), _committed_runs())
    assert len(found) > 3 * 8 * len(ARITHMETIC_BOUNDS)
    assert [claim for claim in found if not claim.holds] == []


def test_the_joint_graph_costs_one_and_two_d_steps():
    rows = [row for result in _committed() for row in result["counts"] if row.get("overlap") == 0]
    assert {row["sub_batches"] for row in rows} == {2, 4, 8, 16}
    for row in rows:
        assert row[JOINT]["operations"] / row["step_operations"] == pytest.approx(1 + 2 * row["sub_batches"], rel=0.01)


def test_counting_without_data_is_counting_a_real_run():
    for result in _committed():
        check = result["errors"]["accounting_check"]
        assert check["without_data"] == check["real_tensors"] == check["allocator"]


@pytest.mark.parametrize("table", ["table", "seconds", "errors"])
def test_the_tables_of_the_documentation_are_drawn_from_the_results(table):
    page = (Path(__file__).parents[2] / "docs" / "cost.md").read_text()
    draw = getattr(cost_report, f"markdown_{table}")
    assert draw(sorted(_committed(), key=lambda result: result["model"])) in page


def test_a_claim_that_does_not_hold_is_said_so(capsys):
    results = _committed()
    results[0]["counts"][0]["exact"]["operations"] *= 2
    assert sum(not claim.holds for claim in claims(results)) == 1
    cost_report.print_claims(results)
    assert "DOES NOT HOLD" in capsys.readouterr().out
    assert not Claim("m", "t", 2.0, 1.0).holds


def test_tables_and_plot_show_every_model(tmp_path, capsys):
    cost_report.print_tables(_committed())
    shown = capsys.readouterr().out
    assert all(f"{model}: training steps of arithmetic" in shown for model in MODELS)
    cost_report.print_runs(_committed_runs())
    shown = capsys.readouterr().out
    assert all(f"{run['counted_steps']:.2f} training steps counted" in shown for run in _committed_runs())
    cost_report.save_plot(_committed(), tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 10_000


def test_the_committed_numbers_are_those_of_this_code():
    (result,) = [result for result in _committed() if result["model"] == "vit-tiny-32"]
    row = next(row for row in result["counts"] if (row["sub_batches"], row["overlap"]) == (2, 0.0))
    cell = workload("vit-tiny-32", torch.device("meta"), batch_size=row["batch_size"], sub_batches=2)
    for path in (FIRST_PASS, "exact_kept", "finite_difference"):
        counts = counted(cell.iteration(path, host_read=False))
        assert (counts.operations, counts.peak) == (row[path]["operations"], row[path]["bytes"])


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDY_MODELS)
def test_a_default_run_takes_the_operations_that_it_reports(name):
    run = count_run(name, torch.device("cpu"))
    assert run["counted_steps"] == pytest.approx(run["reported_steps"], rel=RUN_BOUND - 1)


@pytest.mark.parametrize("path", [*PATHS, JOINT])
def test_every_path_gives_the_same_scale_gradient_on_real_tensors(path):
    cell = workload("vit-tiny-32", torch.device("cpu"), batch_size=4)
    gradients = []
    for way in (JOINT, path):
        torch.manual_seed(0)
        gradients.append(cell.iteration(way, host_read=True)())
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[0].norm()
