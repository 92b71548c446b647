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
SINGLE, COMBINED = 12, 20
"""Number of measures that are tested, and of those that combinations are made of: the first on `CHOSEN_ON`."""
DRAWS, OFFERED, RESAMPLED = 2_000, 20, 1_000
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
    return _pearson(_ranks(values), _ranks(accuracy))


@dataclasses.dataclass(frozen=True)
class Score:
    """A sum of ranks of measures, each with the sign that it has on `CHOSEN_ON`.

    Attributes:
        signs: {measure: +1 or -1}.
    """

    signs: dict[str, float]

    @property
    def name(self) -> str:
        """The measures with their signs."""
        return " ".join(f"{'+' if sign > 0 else '-'} {measure}" for measure, sign in self.signs.items())

    def of(self, half: Half) -> np.ndarray | None:
        """(N,) its values on a half; None where that lacks one of the measures."""
        if not self.signs.keys() <= half.measures.keys():
            return None
        return np.sum([_ranks(sign * half.measures[measure]) for measure, sign in self.signs.items()], axis=0)


def chosen_scores(half: Half, accuracy: np.ndarray) -> tuple[list[Score], list[Score]]:
    """The best single measures of a half, and the best pair and triple of them, by their correlation."""
    target = _ranks(accuracy)
    found = {key: _pearson(_ranks(values), target) for key, values in half.measures.items()}
    ranked = sorted((key for key in found if np.isfinite(found[key])), key=lambda key: -abs(found[key]))
    signs = {key: float(np.sign(found[key])) for key in ranked}
    rows = {key: _ranks(signs[key] * half.measures[key]) for key in ranked[:COMBINED]}
    best = [
        max(itertools.combinations(rows, size), key=lambda keys: _pearson(sum(rows[key] for key in keys), target))
        for size in (2, 3)
    ]
    singles = [Score({key: signs[key]}) for key in ranked[:SINGLE]]
    return singles, [Score({key: signs[key] for key in keys}) for keys in best]


def tested(scores: Sequence[Score], halves: Sequence[Half], accuracies: Sequence[np.ndarray]) -> dict[str, Any]:
    """Correlations on other halves, with what chance may do.

    Args:
        scores: that were chosen elsewhere.
        halves: to test on.
        accuracies: (N,) of each half.

    Returns:
        {score: {"halves": (correlation, least, largest) of each, NaN where it is not measured; "mean": of the halves;
        "p": share of the resampled means that are not above 0, Holm-corrected over the scores}}, with bootstrap
        intervals of 90%.
    """
    draw = np.random.default_rng(2)
    samples = [draw.integers(len(half.names), size=(RESAMPLED, len(half.names))) for half in halves]
    found: dict[str, Any] = {}
    for score in scores:
        cells, resampled = [], []
        for half, accuracy, chosen in zip(halves, accuracies, samples, strict=True):
            values = score.of(half)
            if values is None:
                cells.append((np.nan,) * 3)
                continue
            own = np.array([correlation(values[rows], accuracy[rows]) for rows in chosen])
            least, largest = np.nanquantile(own, (0.05, 0.95))
            cells.append((correlation(values, accuracy), float(least), float(largest)))
            resampled.append(own)
        share = float(np.mean(np.nanmean(resampled, axis=0) <= 0))
        found[score.name] = {"halves": cells, "mean": float(np.nanmean([cell[0] for cell in cells])), "p": share}
    largest_p = 0.0
    for rank, row in enumerate(sorted(found.values(), key=lambda row: row["p"])):
        largest_p = max(largest_p, min(1.0, (len(found) - rank) * row["p"]))
        row["p"] = largest_p
    return found


def _ranks(values: np.ndarray) -> np.ndarray:
    ranks: np.ndarray = stats.rankdata(np.where(np.isfinite(values), values, -np.inf))
    return ranks


def _pearson(left: np.ndarray, right: np.ndarray) -> float:
    if len(left) < 3 or not (np.ptp(left) and np.ptp(right)):
        return float("nan")
    return float(np.corrcoef(left, right)[0, 1])


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
    halves = dict(_present())
    out = sys.stdout.write
    out("configurations: " + ", ".join(f"{_label(h)}: {len(h.names)}" for h in halves.values()) + "\n")
    table: dict[str, Any] = {}
    rates = [key for key in halves[CHOSEN_ON].accuracy if all(key in half.accuracy for half in halves.values())]
    for rate in rates:
        table[str(rate)] = _tables(halves, rate, out)
    (RESULTS / "correlations.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 0


def _present() -> Iterator[tuple[tuple[str, int], Half]]:
    """The halves that hold enough configurations, trained at both learning rates or at the first."""
    for model, seed, rates in itertools.product(FAMILIES, (0, 1), (LEARNING_RATES, LEARNING_RATES[:1])):
        half = load(model, seed, rates)
        if len(half.names) > OFFERED and COMMON in half.names:
            yield (model, seed), half


def _label(half: Half) -> str:
    return f"{half.model} {half.seed}"


def _tables(halves: dict[tuple[str, int], Half], rate: float | str, out: Callable[[str], object]) -> dict[str, Any]:
    """Print the tables of accuracies at a learning rate, and return their numbers."""
    first = halves[CHOSEN_ON]
    singles, combined = chosen_scores(first, first.accuracy[rate])
    others = [half for key, half in halves.items() if key != CHOSEN_ON]
    accuracies = [half.accuracy[rate] for half in others]
    out(f"\n## Learning rate {rate}\n\n| measures | {_label(first)} | ")
    out(" | ".join(map(_label, others)) + " | mean, p |\n")
    correlations = tested([*singles, *combined], others, accuracies)
    for score in (*singles, *combined):
        row, values = correlations[score.name], score.of(first)
        assert values is not None
        own = row["chosen_on"] = correlation(values, first.accuracy[rate])
        cells = [f"{value:+.2f} ({least:+.2f} to {most:+.2f})" for value, least, most in row["halves"]]
        out(f"| {score.name} | {own:+.2f} | {' | '.join(cells)} | {row['mean']:+.2f}, {row['p']:.3f} |\n")
    races = {}
    for steps in RACE_STEPS:
        races[steps] = [correlation(-half.race[steps], half.accuracy[rate]) for half in halves.values()]
        own, *rest = (f"{value:+.2f}" for value in races[steps])
        out(f"| - loss after {steps} steps | {own} | {' | '.join(rest)} | |\n")
    out("\n| rule | " + " | ".join(f"{_label(half)}: gain (best) stays" for half in halves.values()) + " |\n")
    gains = {}
    for name, rule in rules():
        gains[name] = [picked(half, rule, half.accuracy[rate]) for half in halves.values()]
        out(f"| {name} | " + " | ".join(f"{g:+.1f} ({b:+.1f}) {s:.0%}" for g, b, s in gains[name]) + " |\n")
    return {
        "halves": [_label(half) for half in halves.values()],
        "correlations": correlations,
        "races": races,
        "rules": gains,
    }


if __name__ == "__main__":
    sys.exit(main())
