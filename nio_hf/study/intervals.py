"""Means with their uncertainty, and the word for a difference.

interval      mean d +- t(0.95, n - 1) sd(d) / sqrt(n), the 90% t interval of n values
corrected     Holm's correction for m means that are tested together: the mean with the k-th smallest p is tested, and
              has its interval, at the level 1 - 0.1 / (m - k + 1); all means after the first that does not differ
              significantly from 0 have the level of that one
test images   an accuracy p on n images has the standard error sqrt(p (1 - p) / n) for other images of the same kind,
              independently of the number of seeds
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

from scipy.stats import t as student

from nio_hf.metrics import Metric

CONFIDENCE = 0.90
Word = Literal["beats", "matches", "undecided", "worse"]
K = TypeVar("K")


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its 90% t interval.

    Attributes:
        mean: Mean of the values.
        half_width: Half of the interval; infinite for one value.
        values: Values of the mean.
        p: Two-sided p value of the mean against 0, corrected as the interval is; NaN for an interval alone.
    """

    mean: float
    half_width: float
    values: tuple[float, ...]
    p: float = math.nan

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half_width

    def text(self, digits: int) -> str:
        """Return the mean with its sign, and half of the interval, with a number of decimal digits."""
        width = f" ± {self.half_width:.{digits}f}" if math.isfinite(self.half_width) else ""
        return f"{self.mean:+.{digits}f}{width}"

    def __str__(self) -> str:
        return self.text(2)


def interval(values: Sequence[float], level: float = CONFIDENCE) -> Interval:
    """Return the mean of values with its t interval."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Interval(mean, math.inf, tuple(values))
    quantile = float(student.ppf(0.5 + level / 2, count - 1))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(count), tuple(values))


def corrected(samples: Mapping[K, Sequence[float]]) -> dict[K, Interval]:
    """Return the mean of each sample, e.g. of paired differences, with interval and p value by Holm's correction."""
    raw = {name: _p_value(values) for name, values in samples.items()}
    found: dict[K, Interval] = {}
    left, largest, all_told = len(raw), 0.0, True
    for name in sorted(raw, key=lambda name: raw[name]):
        p = min(1.0, left * raw[name])
        largest = max(largest, p)
        found[name] = dataclasses.replace(interval(samples[name], 1 - (1 - CONFIDENCE) / left), p=largest)
        all_told &= p < 1 - CONFIDENCE
        left -= all_told
    return {name: found[name] for name in samples}


def judge(difference: Interval, margin: float) -> Word:
    """Return the word for a paired gain.

    Returns:
        "beats" for an interval above 0, "matches" above minus the margin, "worse" below it, else "undecided".
    """
    if difference.low > 0:
        return "beats"
    if difference.low > -margin:
        return "matches"
    return "worse" if difference.high < -margin else "undecided"


def image_error(accuracy: float, images: int) -> float:
    """Return the standard error of an accuracy for other images of the same kind, both in percent."""
    return math.sqrt(accuracy * (100 - accuracy) / images)


def paired_gain(metric: Metric, own: Sequence[float], other: Sequence[float]) -> Interval:
    """Return the mean gain of values of a metric over the values that they are paired with, with its interval."""
    return interval([metric.gain(a, b) for a, b in zip(own, other, strict=True)])


def gain_text(metric: Metric, gain: Interval) -> str:
    """Return a gain as text, with its uncertainty and its unit."""
    return f"{gain.text(metric.digits)} {metric.points}"


def _p_value(values: Sequence[float]) -> float:
    """Return the two-sided p value of the mean against 0; 1 for a single value, or if all values are 0."""
    if len(values) < 2 or not any(values):
        return 1.0
    error = statistics.stdev(values) / math.sqrt(len(values))
    return 0.0 if error == 0 else float(2 * student.sf(abs(statistics.fmean(values)) / error, len(values) - 1))
