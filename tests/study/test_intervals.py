"""Means with their uncertainty."""

import math

import pytest
from scipy import stats

from nio_hf.metrics import LOSS
from nio_hf.study.intervals import Interval, corrected, gain_text, interval, judge

SAMPLES = {"large": [1.0, 1.1, 0.9], "noisy": [0.5, -0.4, 0.3], "small": [0.2, 0.3, 0.15]}


def test_holm_corrects_the_smallest_p_most():
    found = corrected(SAMPLES)
    assert list(found) == list(SAMPLES)
    for name, left in {"large": 3, "small": 2, "noisy": 1}.items():
        test = stats.ttest_1samp(SAMPLES[name], 0)
        assert found[name].p == pytest.approx(left * test.pvalue)
        assert (found[name].low, found[name].high) == pytest.approx(test.confidence_interval(1 - 0.1 / left))


def test_an_interval_holds_zero_where_its_p_is_not_below_a_tenth():
    """After the first mean without a significant difference, intervals keep its level and p does not fall."""
    samples = {"a": [1.0, 1.2, 0.1], "b": [1.0, 1.3, 0.05], "c": [1.0, 1.4, 0.02]}
    found = corrected(samples)
    raw = {name: float(stats.ttest_1samp(values, 0).pvalue) for name, values in samples.items()}
    assert 0.1 / 3 < raw["a"] < raw["b"] < raw["c"]
    assert min(raw.values()) < 0.2
    for difference in found.values():
        assert difference.p >= 3 * raw["a"]
        assert (difference.low > 0) == (difference.p < 0.1)
    assert found["c"].p >= found["b"].p >= found["a"].p


def test_what_tells_nothing_has_p_one():
    found = corrected({"one": [3.0], "zeros": [0.0, 0.0], "same": [1.0, 1.0]})
    assert (found["one"].p, math.isinf(found["one"].half_width)) == (1.0, True)
    assert found["zeros"].p == 1.0
    assert found["same"].p == 0.0
    assert corrected({}) == {}
    assert gain_text(LOSS, interval([0.25])) == "+0.2500 nats", "of a single seed without an uncertainty"


@pytest.mark.parametrize(
    ("mean", "half_width", "word"),
    [
        (1.0, 0.9, "beats"),
        (0.0, 0.4, "matches"),
        (0.5, 1.0, "undecided"),
        (0.5, 0.5, "matches"),
        (-0.4, 0.05, "matches"),
        (-1.0, 0.4, "worse"),
        (-1.0, 0.6, "undecided"),
        (5.0, math.inf, "undecided"),
    ],
)
def test_the_words_of_a_verdict(mean, half_width, word):
    assert judge(Interval(mean, half_width, ()), 0.5) == word
