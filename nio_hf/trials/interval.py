"""Means with their uncertainty.

interval     mean d +- t(0.95, n - 1) sd(d) / sqrt(n), the 90% t interval of n values
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from scipy.stats import t as student

CONFIDENCE = 0.90


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its 90% t interval.

    Attributes:
        mean: of the values.
        half_width: of the interval; infinite for one value.
        values: what it is of.
    """

    mean: float
    half_width: float
    values: tuple[float, ...]

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half_width

    def __str__(self) -> str:
        return f"{self.mean:+.2f}" + (f" ± {self.half_width:.2f}" if math.isfinite(self.half_width) else "")


def interval(values: Sequence[float]) -> Interval:
    """The mean of some values with its 90% t interval."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Interval(mean, math.inf, tuple(values))
    quantile = float(student.ppf(0.5 + CONFIDENCE / 2, count - 1))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(count), tuple(values))


def paired(own: Sequence[float], other: Sequence[float]) -> Interval:
    """The mean of differences between paired values, with its interval."""
    return interval([a - b for a, b in zip(own, other, strict=True)])
