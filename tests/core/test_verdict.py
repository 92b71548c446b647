"""What is said of a run, from numbers made up for it."""

import math

import pytest
from scipy import stats

from nio_hf import GradCosine, NIOConfig
from nio_hf.core import GroupScale
from nio_hf.core.verdict import describe_scales, judge, rise_interval, t_quantile

VALUES = (0.18, 0.22, 0.21, 0.19)
RISES = (0.19, 0.21, 0.2, 0.2)
NOISE = (0.3, -0.3, 0.2, -0.1)


def measured(values, grad_norm=3.0, loss=2.0):
    return GradCosine.mean([GradCosine(value, grad_norm, (grad_norm,) * 2, loss, 8) for value in values])


def groups(*scales):
    return tuple(GroupScale(f"group {index}", scale, 1, 10) for index, scale in enumerate(scales))


def verdict(*, before=VALUES, rises=RISES, scales=(2.0,), exhausted=False, gamma=None, search="published", **after):
    config = NIOConfig(search=search, gamma=gamma, iterations=3)
    later = tuple(value + rise for value, rise in zip(before, rises, strict=True))
    return judge(measured(before), measured(later, **after), groups(*scales), config, data_exhausted=exhausted)


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        ({}, "improved", "GradCosine rose. All scaled weights were multiplied by 2"),
        ({"grad_norm": 99.0}, "improved", "gradient norm 3 -> 99"),
        ({"rises": NOISE}, "changed", "The report batches do not tell whether GradCosine rose or fell"),
        ({"before": (0.2,), "rises": (0.2,)}, "changed", "One report batch does not tell"),
        ({"rises": tuple(-rise for rise in RISES)}, "worsened", "GradCosine fell. All scaled weights"),
        ({"grad_norm": 5.4, "gamma": 5.0}, "improved", "GradCosine rose"),
        ({"grad_norm": 5.6, "gamma": 5.0}, "constraint_violated", "ended above gamma = 5. "),
        ({"loss": 2.49}, "improved", "loss at init 2.0000 -> 2.4900"),
        ({"loss": 2.51}, "collapse_suspected", "Collapse suspected: gradients agree at the cost of the loss"),
        ({"loss": 2.51, "grad_norm": 9.0, "gamma": 5.0}, "collapse_suspected", "gradient norm 3 -> 9"),
        ({"exhausted": True}, "data_exhausted", "The data ended before the 3 iterations were done"),
        ({"exhausted": True, "loss": 9.0}, "data_exhausted", "The data ended"),
        (
            {"scales": (1.0,)},
            "unchanged",
            "No scale was changed: no larger weights are needed, or none keep the bounds",
        ),
        ({"scales": (1.0, 1.0), "rises": (0.0,) * 4}, "unchanged", "No scale was changed"),
    ],
)
def test_status_and_message_follow_the_measurements(given, status, message):
    found, said = verdict(**given)
    assert found == status
    assert message in said
    for part in ("GradCosine (D = 2, B/D = 4) 0.2000 ->", "gradient norm 3 ->", "loss at init 2.0000 ->"):
        assert part in said
    assert said.endswith(".")


@pytest.mark.parametrize("sign", [1, -1, 4])
def test_of_computed_scales_gradcosine_and_loss_are_told_and_decide_nothing(sign):
    rises = tuple(sign * 0.19 + rise / 100 for rise in RISES)
    found, message = verdict(rises=rises, loss=2.9, search="balance")
    assert found == "changed"
    assert message.startswith("All scaled weights were multiplied by 2. GradCosine (D = 2, B/D = 4) 0.2000 -> ")
    assert verdict(rises=rises, scales=(1.0, 1.0), search="balance")[0] == "unchanged"


@pytest.mark.parametrize("rise", [0.0, 1e-4, -1e-4])
def test_agreement_that_was_above_the_threshold_before_is_no_collapse(rise):
    """Regression starts at 0.9965 and stays there."""
    noise = (2e-3, -2e-3, 1e-3, -1e-3)
    before = (0.9965, 0.9962, 0.9968, 0.9965)
    found, said = verdict(before=before, rises=tuple(rise + change for change in noise))
    assert found == "changed"
    assert "ollapse" not in said


def test_agreement_that_rises_above_the_threshold_is_a_collapse():
    found, said = verdict(rises=tuple(0.77 + change for change in (0.001, -0.001, 0.002, -0.002)))
    assert found == "collapse_suspected"
    assert "Set a lower NIOConfig.gamma, or fewer NIOConfig.iterations" in said


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        ((3.6996,), "All scaled weights were multiplied by 3.7"),
        ((0.5, 1.0, 4.0), "Weights were multiplied: group 0 by 0.5, group 1 by 1, group 2 by 4"),
        ((1.0, 0.5, 4.0, 1.0, 1.0, 1.0, 1.0), "The weights of 7 groups were multiplied by 0.5 to 4"),
        ((1.0,) * 7, "No scale was changed: no larger weights are needed, or none keep the bounds"),
    ],
)
def test_the_message_says_by_how_much_weights_were_multiplied(scales, said):
    assert describe_scales(groups(*scales)) == said
    assert said in verdict(scales=scales)[1]


@pytest.mark.parametrize("degrees", [*range(1, 12), 30, 1000])
def test_quantiles_are_those_of_student(degrees):
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.95, degrees), rel=3e-3)


def test_the_interval_is_that_of_the_textbook():
    rises = [0.19, 0.21, 0.2, 0.2]
    low, high = rise_interval(measured(VALUES), measured(tuple(v + r for v, r in zip(VALUES, rises, strict=True))))
    expected = stats.t.interval(0.9, 3, loc=0.2, scale=stats.sem(rises))
    assert (low, high) == pytest.approx(expected, abs=1e-4)
    low, high = rise_interval(measured((0.1,)), measured((0.3,)))
    assert (low, high) == (-math.inf, math.inf)
