"""What is said of a run, from numbers made up for it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nio_hf import GradCosine, NIOConfig
from nio_hf.core import IterationRecord
from nio_hf.core.verdict import judge

BEFORE = GradCosine(value=0.2, grad_norm=3.0, norms=(3.0, 3.0), loss=2.0, batch_size=8)
GOOD: dict[str, Any] = {
    "value": 0.4,
    "grad_norm": 4.0,
    "loss": 2.05,
    "error": 0.05,
    "gamma": 5.0,
    "iterations": 3,
    "loss_rise": None,
}


def verdict(**changes: Any) -> tuple[str, str]:
    given = {**GOOD, **changes}
    after = GradCosine(given["value"], given["grad_norm"], (3.0, 3.0), given["loss"], 8)
    history = [IterationRecord(i, 0.2, 3.0, 2.0, "objective", 0.1, "exact", None) for i in range(given["iterations"])]
    return judge(BEFORE, after, given["error"], history, NIOConfig(iterations=3), given["gamma"], given["loss_rise"])


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({}, "improved", "Improved: "),
        ({"gamma": None, "grad_norm": 99.0}, "improved", "gradient norm 3 -> 99"),
        ({"error": 0.09}, "improved", "Improved"),
        ({"error": 0.11}, "no_improvement", "No improvement beyond the noise"),
        ({"value": 0.1}, "no_improvement", "0.2000 -> 0.1000"),
        ({"error": math.nan, "value": 0.1}, "no_improvement", "0.2000 -> 0.1000"),
        ({"grad_norm": 5.4}, "improved", "Improved"),
        ({"grad_norm": 5.6}, "constraint_violated", "ended above gamma = 5. "),
        ({"loss": 2.49}, "improved", "loss at init 2.0000 -> 2.4900"),
        ({"loss": 2.51}, "collapse_suspected", "Collapse suspected"),
        ({"value": 0.96}, "collapse_suspected", "Lower lr or iterations, or set a lower gamma"),
        ({"loss": 2.51, "grad_norm": 9.0}, "collapse_suspected", "gradient norm 3 -> 9"),
        ({"iterations": 2}, "data_exhausted", "The data ended after 2 of 3 iterations"),
        ({"iterations": 1, "loss": 9.0}, "data_exhausted", "1 of 3"),
        (
            {"iterations": 2, "loss_rise": 0.15},
            "improved",
            "ended after 2 of 3 iterations: the loss of a batch had risen by 15%",
        ),
        ({"iterations": 2, "loss_rise": 0.15, "value": 0.1}, "no_improvement", "the loss of a batch had risen by 15%"),
    ],
)
def test_status_and_message_follow_the_measurements(changes: dict[str, Any], status: str, message: str) -> None:
    found, said = verdict(**changes)
    assert found == status
    assert message in said
    for number in ("GradCosine", "gradient norm 3 ->", "loss at init 2.0000 ->"):
        assert number in said
