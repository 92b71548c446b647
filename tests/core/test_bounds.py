"""The bounds of accepted points."""

from __future__ import annotations

import math

import pytest
from nio_hf.core.bounds import Bounds

from nio_hf.core import GradCosine, NIOConfig
from nio_hf.core.result import Reading


def reading(loss: float, grad_norm: float) -> Reading:
    return Reading(GradCosine(0.1, grad_norm, (grad_norm,) * 2, loss, 8), (0.1, 0.1))


CONFIG = NIOConfig(loss_bound=0.5, norm_band=(0.5, 2.0))


def test_the_loss_is_relative_to_the_start_and_the_norm_to_the_stage() -> None:
    bounds = Bounds.of(CONFIG, start=reading(2.0, 10.0), common=reading(2.9, 30.0))
    assert bounds == Bounds(most_loss=3.0, least_norm=15.0, most_norm=60.0)


def test_while_the_common_factor_is_sought_the_norm_may_rise() -> None:
    assert Bounds.of(CONFIG, reading(2.0, 10.0)) == Bounds(most_loss=3.0, least_norm=5.0, most_norm=math.inf)


def test_a_negative_loss_may_rise_by_a_part_of_its_size() -> None:
    start = reading(-2.0, 1.0)
    assert Bounds.of(CONFIG, start).most_loss == -1.0


@pytest.mark.parametrize(
    ("loss", "grad_norm", "broken"),
    [
        (3.0, 10.0, None),
        (3.0, 5.0, None),
        (-9.0, 20.0, None),
        (3.001, 10.0, "loss_bound"),
        (3.001, 99.0, "loss_bound"),
        (2.0, 4.99, "norm_band"),
        (2.0, 20.01, "norm_band"),
        (math.nan, 10.0, "loss_bound"),
        (math.inf, 10.0, "loss_bound"),
        (2.0, math.nan, "norm_band"),
    ],
)
def test_a_point_is_told_which_bound_it_breaks(loss: float, grad_norm: float, broken: str | None) -> None:
    start = reading(2.0, 10.0)
    bounds = Bounds.of(CONFIG, start, start)
    assert bounds.broken_by(reading(loss, grad_norm)) == broken


def test_without_bounds_all_finite_points_are_allowed() -> None:
    start = reading(2.0, 10.0)
    bounds = Bounds.of(NIOConfig(loss_bound=None, norm_band=None), start, start)
    assert bounds.broken_by(reading(1e30, 1e-30)) is None
    assert [bounds.broken_by(reading(loss, 1.0)) for loss in (math.nan, math.inf)] == ["loss_bound"] * 2
