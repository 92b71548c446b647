"""Arms of one or more comparisons held against one of them, seed by seed, as a table for each learning rate.

python -m benchmarks.warmup_free.differences vit-variants swin-variants --to nio
python -m benchmarks.warmup_free.differences vit-controls swin-controls --to no_warmup

Of the runs that chose the settings: mean accuracy; its paired difference with the 90% t interval; least and largest
scale that the initialisation gave a tensor, and its cost in training steps, means over the seeds. The seeds are those
by which settings were chosen, so that these numbers describe and are no verdict.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.warmup_free.first_steps import Record, arm_title, read_comparisons
from benchmarks.warmup_free.study import RESULTS
from nio_hf.report.tables import markdown_table
from nio_hf.trials.interval import paired

Cells = dict[str, dict[int, Record]]
"""{arm, with the length of its warmup: {seed: outcome}}."""


def cells_at(records: Sequence[Record], rate: float) -> Cells:
    """The outcomes at a learning rate."""
    found: Cells = {}
    for record in records:
        run = record["run"]
        if run["learning_rate"] == rate:
            found.setdefault(arm_title(run["arm"], run["warmup_ratio"]), {})[run["seed"]] = record["outcome"]
    return found


def row(cells: Cells, arm: str, reference: str) -> tuple[str, ...]:
    """(accuracy, paired difference to the reference, scales, cost) of an arm, on the seeds that both have."""
    own, other = cells.get(arm, {}), cells[reference]
    seeds = sorted(own.keys() & other.keys())
    if not seeds:
        return ("-",) * 4
    outcomes = [own[seed] for seed in seeds]
    accuracies = [outcome["accuracy"] for outcome in outcomes]
    others = [other[seed]["accuracy"] for seed in seeds]
    if None in accuracies:
        return (f"{accuracies.count(None)} of {len(seeds)} failed", "-", "-", "-")
    cost = statistics.fmean(outcome["cost_steps"] for outcome in outcomes)
    return (
        f"{statistics.fmean(accuracies):.1f}",
        "-" if arm == reference or None in others else str(paired(accuracies, others)),
        _scales(outcomes),
        f"{cost:.0f}" if cost else "-",
    )


def _scales(outcomes: Sequence[Record]) -> str:
    scales = [outcome["initialisation"]["scales"] for outcome in outcomes if outcome["initialisation"]]
    if not any(scales):
        return "-"
    low, high = (f"{statistics.fmean(map(end, scales)):.2f}" for end in (min, max))
    return low if low == high else f"{low} to {high}"


def table(comparisons: Mapping[str, Sequence[Record]], rate: float, reference: str) -> str:
    """The arms of comparisons at a learning rate, in Markdown; those of one side by side with those of the next."""
    cells = [cells_at(records, rate) for records in comparisons.values()]
    arms = list(dict.fromkeys(arm for each in cells for arm in each))
    columns = [
        "",
        *(f"{name}: {column}" for name in comparisons for column in ("%", f"- {reference}", "scales", "cost")),
    ]
    rows = [[arm, *(part for each in cells for part in row(each, arm, reference))] for arm in arms]
    return markdown_table(columns, rows)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help="of comparisons of the study")
    parser.add_argument("--to", required=True, metavar="ARM", help="to hold the others against")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the comparisons")
    asked = parser.parse_args()
    comparisons = read_comparisons(asked.names, asked.results)
    for rate in sorted({record["run"]["learning_rate"] for records in comparisons.values() for record in records}):
        sys.stdout.write(f"{rate:g}\n\n{table(comparisons, rate, asked.to)}\n\n")


if __name__ == "__main__":
    main()
