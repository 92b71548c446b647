"""What moves in the first steps of the trainings of comparisons, as a table by arm and learning rate, and as a plot.

python -m benchmarks.warmup_free.first_steps vit swin --learning_rates 1e-3
python -m benchmarks.warmup_free.first_steps vit swin --plot benchmarks/results/warmup-free/angles.png

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.warmup_free.study import RESULTS
from nio_hf.report.style import BLUE, DARK, GREEN, GREY, ORANGE, PURPLE, VERMILLION, figure, legend_below
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
LOOKS = {
    "no_warmup": {"color": DARK, "marker": "o"},
    **{
        f"warmup {ratio}": {"color": VERMILLION, "marker": marker, "linestyle": "--"}
        for ratio, marker in (("2%", "v"), ("5%", "<"), ("10%", ">"), ("30%", "^"))
    },
    "nio": {"color": BLUE, "marker": "s"},
    "gi_adam": {"color": GREEN, "marker": "D"},
    "nio_seeded": {"color": ORANGE, "marker": "P"},
    "radam": {"color": PURPLE, "marker": "X"},
}
OTHER_LOOK = {"color": GREY, "marker": "."}
Record = dict[str, Any]


def read_runs(directory: Path) -> list[Record]:
    """The runs of a comparison that chose its settings."""
    lines = (directory / RESULTS_NAME).read_text(encoding="utf-8").splitlines()[1:]
    return [record for record in map(json.loads, lines) if record["run"]["stage"] == "selection"]


def read_comparisons(names: Sequence[str], results: Path) -> dict[str, list[Record]]:
    """{name: runs} of comparisons that lie in a folder."""
    return {name: read_runs(results / name) for name in names}


def arm_title(arm: str, warmup_ratio: float) -> str:
    """An arm with the length of its warmup."""
    return f"{arm} {warmup_ratio:.0%}" if warmup_ratio else arm


def rows(records: Sequence[Record], learning_rates: Sequence[float]) -> list[tuple[str, ...]]:
    """A row for each arm, length of warmup and learning rate, as `COLUMNS`; of runs that did not fail."""
    return [_row(*key, outcomes) for key, outcomes in _group(records, learning_rates).items()]


def _group(records: Sequence[Record], learning_rates: Sequence[float]) -> dict[tuple[str, float, float], list[Record]]:
    """{(arm, length of warmup, learning rate): outcomes} of the runs that did not fail."""
    groups: dict[tuple[str, float, float], list[Record]] = {}
    for record in records:
        run, outcome = record["run"], record["outcome"]
        complete = outcome["error"] is None and outcome["diagnostics"] and len(outcome["losses"]) > FIRST
        if complete and (not learning_rates or run["learning_rate"] in learning_rates):
            key = (run["arm"], run["warmup_ratio"], run["learning_rate"])
            groups.setdefault(key, []).append(outcome)
    return groups


def _first(outcomes: Sequence[Record], quantity: str) -> float:
    """Mean of a quantity over the first steps and the seeds."""
    means = [statistics.fmean(outcome["diagnostics"][quantity][:FIRST]) for outcome in outcomes]
    known = [mean for mean in means if math.isfinite(mean)]
    return statistics.fmean(known) if known else math.nan


def _accuracy(outcomes: Sequence[Record]) -> float:
    return statistics.fmean(outcome["accuracy"] for outcome in outcomes)


def _row(arm: str, warmup_ratio: float, rate: float, outcomes: Sequence[Record]) -> tuple[str, ...]:
    return (
        arm_title(arm, warmup_ratio),
        f"{rate:g}",
        f"{_first(outcomes, 'relative_update'):.4f}",
        f"{1000 * _first(outcomes, 'angular_update'):.1f}",
        f"{_first(outcomes, 'output_change'):.3f}",
        f"{statistics.fmean(statistics.fmean(o['grad_norms'][:FIRST]) for o in outcomes):.2f}",
        f"{statistics.fmean(o['losses'][FIRST] for o in outcomes):.3f}",
        f"{statistics.fmean(statistics.fmean(o['losses'][-50:]) for o in outcomes):.3f}",
        f"{_accuracy(outcomes):.1f}",
    )


def draw(comparisons: Mapping[str, Sequence[Record]], target: Path) -> None:
    """Draw the accuracy of each arm against the angle by which its weights turn, a point for each learning rate."""
    with figure(target, width=8.5, height=4.8) as drawn:
        panels = drawn.subplots(1, len(comparisons), squeeze=False)[0]
        for axes, (name, records) in zip(panels, comparisons.items(), strict=True):
            points: dict[str, list[tuple[float, float]]] = {}
            for (arm, ratio, _), outcomes in sorted(_group(records, ()).items()):
                point = (1000 * _first(outcomes, "angular_update"), _accuracy(outcomes))
                points.setdefault(arm_title(arm, ratio), []).append(point)
            for title in sorted(points, key=[*LOOKS, *points].index):
                look = LOOKS.get(title, OTHER_LOOK)
                axes.plot(*zip(*points[title], strict=True), markersize=4, label=title, **look)
            axes.set_xscale("log")
            axes.set_title(name)
            axes.set_xlabel(f"angle of a step (mrad), mean of the first {FIRST}")
        panels[0].set_ylabel("accuracy (%)")
        legend_below(drawn, panels[0], columns=5)


def main() -> None:
    """Print the tables of comparisons, and draw their plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help="of comparisons of the study")
    parser.add_argument("--learning_rates", type=float, nargs="*", default=[], help="default: all")
    parser.add_argument("--plot", type=Path, help="file to draw accuracy against angle into")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the comparisons")
    asked = parser.parse_args()
    comparisons = read_comparisons(asked.names, asked.results)
    for name, records in comparisons.items():
        sys.stdout.write(f"{name}\n\n{markdown_table(COLUMNS, rows(records, asked.learning_rates))}\n\n")
    if asked.plot is not None:
        draw(comparisons, asked.plot)


if __name__ == "__main__":
    main()
