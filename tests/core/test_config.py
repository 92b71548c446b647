"""Settings are checked together."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nio_hf import NIOConfig
from nio_hf.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("iterations", [0, -1, 1.5, True, "3"], [1]),
        ("sub_batches", [1, 0, 2.0], [2]),
        ("overlap", [-0.1, 1.0, 1, math.nan, "0"], [0, 0.0, 0.99]),
        ("gamma_relative", [0.0, -1.0, math.inf, math.nan], [None, 0.5]),
        ("lr", [0.0, -1.0, math.nan, math.inf, "0.1"], [1e-9]),
        ("min_scale", [0.0, -1.0, 1.1], [None, 1.0, 0.5]),
        ("max_scale", [0.0, 0.9, math.inf], [1.0]),
        ("beta", [0.0, -1.0], [0.1]),
        ("objective", ["cosine", None], ["gc", "gc_norm", "gc_sum_norm", "variance"]),
        ("curvature", ["fast", None], ["auto", "exact", "exact_kept", "finite_difference", "finite_difference_kept"]),
        ("batch_norm", ["train"], ["batch", "frozen"]),
        ("scaled_names", ["", "(", 3, ["attention"]], [None, "attention"]),
        ("micro_batch_size", [0, 2.5], [None, 1]),
        ("holdout_batches", [0], [1]),
        ("seed", [-1, 0.5, True], [0]),
    ],
)
def test_values_out_of_range_are_refused_with_their_name(name: str, bad: list[Any], good: list[Any]) -> None:
    for value in good:
        assert getattr(NIOConfig(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(ConfigError) as caught:
            NIOConfig(**{name: value})
        assert len(caught.value.problems) == 1
        assert name.removeprefix("max_") in f"{caught.value}" or name == "max_scale"


@pytest.mark.parametrize("gamma", [0.0, -3.0, math.nan])
def test_gamma_must_be_above_zero(gamma: float) -> None:
    with pytest.raises(ConfigError, match=r"NIOConfig.gamma: .*Give a finite number above 0"):
        NIOConfig(gamma=gamma, gamma_relative=None)


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({}, 1.0),
        ({"gamma_relative": 1.0}, 1.0),
        ({"gamma_relative": None}, 1.0),
        ({"gamma_relative": 0.8}, 0.01),
        ({"gamma": 3.0}, 0.01),
        ({"scale_sharing": "tensor"}, 0.01),
        ({"scale_sharing": "kind"}, 0.01),
        ({"min_scale": 0.5}, 0.5),
        ({"scale_sharing": "tensor", "min_scale": 1.0}, 1.0),
    ],
)
def test_one_scale_for_the_model_does_not_fall_unless_asked_to(settings: dict[str, Any], least: float) -> None:
    assert NIOConfig(**settings).least_scale == least


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        NIOConfig(iterations=0, overlap=1.0, lr=-1.0)
    assert {problem.where for problem in caught.value.problems} == {
        "NIOConfig.iterations",
        "NIOConfig.overlap",
        "NIOConfig.lr",
    }
    message = str(caught.value)
    assert message.startswith("3 problems:\n  1. ")
    assert "NIOConfig.overlap: 1.0. Give a number in [0, 1)." in message
