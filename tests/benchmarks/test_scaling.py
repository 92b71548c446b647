"""The models of what several processes cost hold for what was measured, and the documents show that."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scaling import BATCH_SIZE, RESULT, STEPS, bytes_summed, samples_at_once, share_of_work, table
from benchmarks.workloads import FIRST_PASS

ROWS = json.loads(RESULT.read_text())["rows"]
README = (Path(__file__).parents[2] / "benchmarks" / "README.md").read_text()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['processes']}-{row['sub_batches']}-{row['path']}")
def test_communication_and_arithmetic_are_as_modelled(row):
    processes, sub_batches = row["processes"], row["sub_batches"]
    gradient_numbers, scaled_tensors = row["gradient_numbers"], row["scaled_tensors"]
    expected = bytes_summed(str(row["path"]), gradient_numbers, scaled_tensors, sub_batches, processes)
    assert row["bytes_summed"] == expected
    steps = STEPS[str(row["path"])] * share_of_work(sub_batches, processes)
    assert row["training_steps"] == pytest.approx(steps, rel=2e-3)


@pytest.mark.parametrize(("fitted", "paths"), [("exact", {"exact", "exact_kept"}), (FIRST_PASS, {FIRST_PASS})])
def test_memory_grows_with_the_samples_held_at_once_as_the_document_says(fitted, paths):
    own = [row for row in ROWS if row["path"] == fitted]
    samples = [samples_at_once(BATCH_SIZE, row["sub_batches"], row["processes"], row["path"]) for row in own]
    slope, fixed = np.polyfit(samples, [row["peak_bytes"] / row["parameter_bytes"] for row in own], 1)
    assert f"{fixed:.1f} P and {slope:.2f} P for each sample" in " ".join(README.split())
    for row in (row for row in ROWS if row["path"] in paths):
        at_once = samples_at_once(BATCH_SIZE, row["sub_batches"], row["processes"], row["path"])
        ratio = row["peak_bytes"] / row["parameter_bytes"] / (fixed + slope * at_once)
        assert 0.97 < ratio < 1.11


def test_the_table_of_the_document_is_what_was_measured():
    assert table(ROWS) in README
