"""What the runs of the landscape say: which measure, or rule, tells good group scales from bad ones.

python -m benchmarks.layer_scales.correlations

Reads benchmarks/results/layer-scales, writes correlations.json and prints the tables of README.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.layer_scales.landscape import LEARNING_RATES, RESULTS, read

FAMILIES = ("vit", "swin", "digits")
CHOSEN_ON = ("vit", 0)
DRAWS, OFFERED = 2_000, 20
RACE_STEPS = (30, 60, 120)
WINDOW = 10
COMMON = "x4"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Half:
    """The configurations of a model at one seed that are measured and trained.

    Attributes:
        model: its name.
        seed: of the weights.
        names: of the configurations.
        measures: {measure: (N,) values}; NaN where it is not finite.
        accuracy: {learning rate, or "best": (N,) in %}.
        race: {steps: (N,) mean training loss of the last window}.
    """

    model: str
    seed: int
    names: list[str]
    measures: dict[str, np.ndarray]
    accuracy: dict[float | str, np.ndarray]
    race: dict[int, np.ndarray]

    @property
    def common(self) -> int:
        """Position of the common factor alone."""
        return self.names.index(COMMON)


def load(model: str, seed: int, rates: Sequence[float]) -> Half:
    """The configurations of one half that have been trained at all of some learning rates."""
    starts: dict[str, Row] = {}
    trainings: dict[tuple[str, float], Row] = {}
    for row in read(model):
        if row["seed"] == seed and row["kind"] == "start":
            starts[row["name"]] = row
        elif row["seed"] == seed:
            trainings[row["name"], row["learning_rate"]] = row
    names = [name for name in starts if all((name, rate) in trainings for rate in rates)]
    by_rate = {rate: np.array([trainings[name, rate]["accuracy"] for name in names]) for rate in rates}
    keys = starts[names[0]]["measures"] if names else ()
    finite = {key: [starts[name]["measures"][key] for name in names] for key in keys}
    race = {steps: np.array([_loss_after(trainings[name, rates[0]], steps) for name in names]) for steps in RACE_STEPS}
    return Half(
        model,
        seed,
        names,
        {key: np.array([np.nan if v is None else v for v in values], float) for key, values in finite.items()},
        {**by_rate, "best": np.max(list(by_rate.values()), axis=0) if names else np.zeros(0)},
        race,
    )


def correlation(values: np.ndarray, accuracy: np.ndarray) -> float:
    """Spearman's rank correlation; a measure that is not finite is ranked below all others."""
    if len(values) < 3:
        return float("nan")
    return float(stats.spearmanr(np.where(np.isfinite(values), values, -np.inf), accuracy)[0])


def picked(half: Half, rule: Callable[[Half, int], float], accuracy: np.ndarray) -> tuple[float, float, float]:
    """What a rule gains over the common factor, the best of what it is offered, and how often it stays.

    Args:
        half: to draw from.
        rule: (half, position) -> score; -infinity where a bound is broken.
        accuracy: (N,).

    Returns:
        Mean accuracy of what the rule picks minus that of the common factor; the same for the best of what was offered;
        share of the draws in which the common factor stays.
    """
    draw = np.random.default_rng(1)
    scores = np.array([rule(half, position) for position in range(len(half.names))])
    random = [position for position, name in enumerate(half.names) if name.isdigit()]
    gains, best, stays = [], [], 0
    for _ in range(DRAWS):
        offered = [half.common, *draw.choice(random, min(OFFERED, len(random)), replace=False)]
        chosen = max(offered, key=lambda position: (scores[position], position == half.common))
        gains.append(accuracy[chosen] - accuracy[half.common])
        best.append(max(accuracy[offered]) - accuracy[half.common])
        stays += chosen == half.common
    return float(np.mean(gains)), float(np.mean(best)), stays / DRAWS


def rules() -> Iterator[tuple[str, Callable[[Half, int], float]]]:
    """(name, rule): an objective under bounds on loss and gradient norm, relative to the common factor."""
    objectives = (
        "gc.d4",
        "gc.d8",
        "gc.d16",
        "gc.samples",
        "gc_sign.d4",
        "gc_body.d4",
        "gc_trunk.d4",
        "gc_tensor_mean.d4",
    )
    bands = {"any norm": (0.0, np.inf), "norm 0.8 to 1.05": (0.8, 1.05), "norm 0.8 to 1.25": (0.8, 1.25)}
    for objective, loss_bound, (band, (least, most)) in itertools.product(
        objectives, (0.06, 0.2, np.inf), bands.items()
    ):
        yield (
            f"{objective}, loss +{loss_bound:.0%}, {band}",
            _Rule(objective, loss_bound, least, most),
        )
    for steps in RACE_STEPS:
        yield f"race of {steps} steps", _Race(steps)


@dataclasses.dataclass(frozen=True)
class _Rule:
    objective: str
    loss_bound: float
    least: float
    most: float

    def __call__(self, half: Half, position: int) -> float:
        loss, norm = (half.measures[key] for key in ("loss", "gn.d4"))
        within = loss[position] <= loss[half.common] * (1 + self.loss_bound)
        within &= self.least <= norm[position] / norm[half.common] <= self.most
        value = half.measures[self.objective][position]
        return float(value) if within and np.isfinite(value) else -np.inf


@dataclasses.dataclass(frozen=True)
class _Race:
    steps: int

    def __call__(self, half: Half, position: int) -> float:
        return -float(half.race[self.steps][position])


def _loss_after(training: Row, steps: int) -> float:
    losses = training["losses"]
    value = losses[steps // WINDOW - 1] if len(losses) >= steps // WINDOW else None
    return np.inf if value is None else value


def main() -> int:
    """Print the tables; returns the exit status."""
    present = [(model, seed) for model in FAMILIES for seed in (0, 1)]
    halves = {}
    for model, seed in present:
        for rates in (LEARNING_RATES, LEARNING_RATES[:1]):
            half = load(model, seed, rates)
            if len(half.names) > OFFERED and COMMON in half.names:
                halves[model, seed] = half
                break
    shown = list(halves)
    out = sys.stdout.write
    out("configurations: " + ", ".join(f"{m} {s}: {len(halves[m, s].names)}" for m, s in shown) + "\n\n")
    first = halves[CHOSEN_ON]
    ranked = sorted(first.measures, key=lambda key: -abs(correlation(first.measures[key], first.accuracy["best"])))
    table: dict[str, Any] = {"correlations": {}, "rules": {}}
    out("| measure | " + " | ".join(f"{m} {s}" for m, s in shown) + " |\n")
    for key in ranked:
        row = [
            correlation(h.measures[key], h.accuracy["best"]) if key in h.measures else float("nan")
            for h in halves.values()
        ]
        table["correlations"][key] = dict(zip(map(str, shown), row, strict=True))
        out(f"| {key} | " + " | ".join(f"{value:+.2f}" for value in row) + " |\n")
    for steps in RACE_STEPS:
        row = [correlation(-h.race[steps], h.accuracy["best"]) for h in halves.values()]
        out(f"| loss after {steps} steps | " + " | ".join(f"{value:+.2f}" for value in row) + " |\n")
    out("\n| rule | " + " | ".join(f"{m} {s}: gain (best) stays" for m, s in shown) + " |\n")
    for name, rule in rules():
        cells = [picked(h, rule, h.accuracy["best"]) for h in halves.values()]
        table["rules"][name] = dict(zip(map(str, shown), cells, strict=True))
        out(f"| {name} | " + " | ".join(f"{g:+.1f} ({b:+.1f}) {s:.0%}" for g, b, s in cells) + " |\n")
    (RESULTS / "correlations.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
