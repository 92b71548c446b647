"""What moves in the first steps of the trainings of a comparison, as a table by arm and learning rate.

python -m benchmarks.warmup_free.first_steps benchmarks/results/warmup-free/vit
python -m benchmarks.warmup_free.first_steps benchmarks/results/warmup-free/vit --learning_rates 1e-3

Means over the seeds and the first ten steps, of the runs that chose the settings: update over weight, angle of the
update and change of the output (see `nio_hf.trials.diagnostics`), the gradient norm, the loss after ten and after all
steps, and the accuracy. Where a run has a quantity that is not finite, the others count.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nio_hf.report.tables import markdown_table
from nio_hf.trials.results import RESULTS_NAME

FIRST = 10
COLUMNS = (
    "arm",
    "learning rate",
    "update / weight",
    "angle (mrad)",
    "change of output",
    "gradient norm",
    f"loss at {FIRST}",
    "last loss",
    "accuracy (%)",
)
Record = dict[str, Any]


def read_runs(directory: Path) -> list[Record]:
    """The runs of a comparison that chose its settings."""
    lines = (directory / RESULTS_NAME).read_text(encoding="utf-8").splitlines()[1:]
    return [record for record in map(json.loads, lines) if record["run"]["stage"] == "selection"]


def arm_title(arm: str, warmup_ratio: float) -> str:
    """An arm with the length of its warmup."""
    return f"{arm} {warmup_ratio:.0%}" if warmup_ratio else arm


def rows(records: Sequence[Record], learning_rates: Sequence[float]) -> list[tuple[str, ...]]:
    """A row for each arm, length of warmup and learning rate, as `COLUMNS`; of runs that did not fail."""
    groups: dict[tuple[str, float, float], list[Record]] = {}
    for record in records:
        run, outcome = record["run"], record["outcome"]
        complete = outcome["error"] is None and outcome["diagnostics"] and len(outcome["losses"]) > FIRST
        if complete and (not learning_rates or run["learning_rate"] in learning_rates):
            key = (run["arm"], run["warmup_ratio"], run["learning_rate"])
            groups.setdefault(key, []).append(outcome)
    return [_row(*key, outcomes) for key, outcomes in groups.items()]


def _row(arm: str, warmup_ratio: float, rate: float, outcomes: Sequence[Record]) -> tuple[str, ...]:
    def first(quantity: str) -> float:
        means = [statistics.fmean(o["diagnostics"][quantity][:FIRST]) for o in outcomes]
        known = [mean for mean in means if math.isfinite(mean)]
        return statistics.fmean(known) if known else math.nan

    return (
        arm_title(arm, warmup_ratio),
        f"{rate:g}",
        f"{first('relative_update'):.4f}",
        f"{1000 * first('angular_update'):.1f}",
        f"{first('output_change'):.3f}",
        f"{statistics.fmean(statistics.fmean(o['grad_norms'][:FIRST]) for o in outcomes):.2f}",
        f"{statistics.fmean(o['losses'][FIRST] for o in outcomes):.3f}",
        f"{statistics.fmean(statistics.fmean(o['losses'][-50:]) for o in outcomes):.3f}",
        f"{statistics.fmean(o['accuracy'] for o in outcomes):.1f}",
    )


def main() -> None:
    """Print the table of a comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of the comparison, with its runs")
    parser.add_argument("--learning_rates", type=float, nargs="*", default=[], help="default: all")
    asked = parser.parse_args()
    table = markdown_table(COLUMNS, rows(read_runs(asked.directory), asked.learning_rates))
    sys.stdout.write(f"{table}\n")


if __name__ == "__main__":
    main()
