"""A direct search for layer scales: groups are scaled by what trainings with them end at.

It says how much there is to find. From the best common factor it doubles or halves the scale of one group of tensors
after the other, and keeps what raises the mean accuracy, on images that are set aside, by more than `LEAST_GAIN`.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.warmup_free.images import GROUPS
from benchmarks.warmup_free.lab import SEARCHED
from nio_hf.files import write_atomically

COMMON = (1.5, 2.0, 2.5)
"""log2 of the common factors that are tried."""
LEAST_GAIN = 0.3
"""Points of mean accuracy below which a change is not kept."""
WIDE_STEP = 2.0
WIDE = ("positions", "reductions")
"""Groups whose first step of log2 of the scale is `WIDE_STEP`; that of the others is 1."""
RATES = {"vit": 5e-4, "swin": 1e-3}
"""{model: learning rate}: the one that was best for four times the class's weights in an earlier study."""
MOST_CONFIGURATIONS = 40
Exponents = tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Found:
    """Where a search is.

    Attributes:
        tried: {exponents of the groups: mean accuracy}.
        best: exponents of the best one.
        missing: exponents that it tries next; None where it is through.
    """

    tried: Mapping[Exponents, float]
    best: Exponents
    missing: Exponents | None


def replay(model: str, accuracies: Mapping[Exponents, Sequence[float]], seeds: int) -> Found:
    """Go through the search as far as the trainings that are there allow.

    Args:
        model: "vit" or "swin".
        accuracies: {exponents: accuracy of each seed so far}.
        seeds: trainings that a configuration needs.
    """
    tried: dict[Exponents, float] = {}
    moves = _moves(model)
    best: Exponents = ()
    try:
        asked = next(moves)
        while len(tried) < MOST_CONFIGURATIONS or asked in tried:
            if len(accuracies.get(asked, ())) < seeds:
                return Found(tried, best, asked)
            tried[asked] = statistics.fmean(accuracies[asked])
            best = max(tried, key=lambda exponents: tried[exponents])
            asked = moves.send(tried[asked])
    except StopIteration:
        pass
    return Found(tried, best, None)


def _moves(model: str) -> Any:
    """The configurations in turn, each answered by its mean accuracy."""
    groups = GROUPS[model]
    level = {}
    for exponent in COMMON:
        level[exponent] = yield tuple((group, exponent) for group in groups)
    common = max(level, key=lambda exponent: level[exponent])
    current, reached = dict.fromkeys(groups, common), level[common]
    while True:
        before = dict(current)
        for group in groups:
            step = WIDE_STEP if group in WIDE else 1.0
            while abs(step) >= 1:
                moved = False
                for sign in (1, -1):
                    while True:
                        candidate = {**current, group: current[group] + sign * step}
                        answer = yield tuple(candidate.items())
                        if answer < reached + LEAST_GAIN:
                            break
                        current, reached, moved = candidate, answer, True
                    if moved:
                        break
                step /= 2
        if current == before:
            return


def save(model: str, best: Exponents) -> None:
    """Keep the scales that were found, unless they are kept already."""
    scales = {group: 2.0**exponent for group, exponent in best}
    known = json.loads(SEARCHED.read_text(encoding="utf-8")) if SEARCHED.is_file() else {}
    if known.get(model) != scales:
        write_atomically(SEARCHED, json.dumps({**known, model: scales}, indent=1) + "\n")


def named(scales: Exponents) -> Iterator[str]:
    """The groups with their scales, in words."""
    for group, exponent in scales:
        yield f"{group} x{2.0**exponent:.3g}"
