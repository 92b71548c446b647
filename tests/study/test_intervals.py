"""Means with their uncertainty."""

import math

import pytest
from scipy import stats

from nio_hf.metrics import ACCURACY, LOSS
from nio_hf.study.intervals import Interval, corrected, gain_text, image_error, interval, judge, paired_gain

SAMPLES = {"large": [1.0, 1.1, 0.9], "noisy": [0.5, -0.4, 0.3], "small": [0.2, 0.3, 0.15]}


def _raw(name):
    return float(stats.ttest_1samp(SAMPLES[name], 0).pvalue)


def _interval(name, level):
    values = SAMPLES[name]
    low, high = stats.t.interval(level, len(values) - 1, loc=sum(values) / len(values), scale=stats.sem(values))
    return float(low), float(high)


def test_holm_corrects_the_smallest_p_most():
    found = corrected(SAMPLES)
    assert list(found) == list(SAMPLES)
    assert found["large"].p == pytest.approx(3 * _raw("large"))
    assert found["small"].p == pytest.approx(2 * _raw("small"))
    assert found["noisy"].p == pytest.approx(_raw("noisy"))
    for name, left in {"large": 3, "small": 2, "noisy": 1}.items():
        assert (found[name].low, found[name].high) == pytest.approx(_interval(name, 1 - 0.1 / left))


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


def test_the_error_of_an_accuracy_is_that_of_a_share():
    right = [1.0] * 42 + [0.0] * 58
    assert image_error(42.0, 100) == pytest.approx(100 * stats.tstd(right) * math.sqrt(99 / 100) / 10)


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


def test_a_gain_is_above_zero_where_the_own_value_is_better():
    own, other = [3.0, 3.5, 2.0], [2.0, 3.0, 1.5]
    assert paired_gain(ACCURACY, own, other) == interval([1.0, 0.5, 0.5])
    assert paired_gain(LOSS, own, other) == interval([-1.0, -0.5, -0.5])


def test_a_gain_is_said_in_what_its_metric_counts_it_in():
    """Values 1, 2, 3 have the half width 2.919986 / sqrt(3) = 1.685855."""
    assert gain_text(ACCURACY, interval([1.0, 2.0, 3.0])) == "+2.00 ± 1.69 points of accuracy"
    assert gain_text(LOSS, interval([-1.0, -2.0, -3.0])) == "-2.0000 ± 1.6859 nats"
    assert gain_text(LOSS, interval([0.25])) == "+0.2500 nats"
