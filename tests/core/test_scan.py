"""The scan: on landscapes that are made up, and on a small model whose best scales are known."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nio_hf.core.scan import ScanState

from nio_hf import GradCosine, NIOConfig, initialize
from nio_hf.core import scan
from nio_hf.core.problem import search_parts
from nio_hf.core.records import restored
from nio_hf.core.result import Reading
from nio_hf.errors import NumericsError, Problem
from tests.core.cases import Agreement, case, scaling_problem
from tests.core.examples import examples

Landscape = Callable[[tuple[float, ...]], tuple[float, float, tuple[float, ...]]]
"""(log2 of the scales, that of the largest group last) -> (loss, gradient norm, scores of two batches)."""


class Measured:
    """A scan whose points have the values of a landscape; all that it asks for is recorded.

    Args:
        landscape: gives the values.
        free: number of groups beside the one with the most parameters, which is the last.
        factor: that keeps variances; 1 keeps the scan from a common factor.
        **settings: of the run.
    """

    def __init__(self, landscape: Landscape, free: int = 2, factor: float = 1.0, **settings: Any) -> None:
        self.landscape, self.factor = landscape, factor
        self.asked: list[tuple[float, ...]] = []
        config = NIOConfig(**{"groups": "kind", "search_batches": 2, "sub_batches": 2, **settings})
        names = [*(f"g{index}" for index in range(free)), "body"]
        self.problem: Any = SimpleNamespace(
            config=config,
            loss=SimpleNamespace(model=None),
            tensors=SimpleNamespace(groups={name: (index,) for index, name in enumerate(names)}),
            initial=[*(torch.zeros(3) for _ in range(free)), torch.zeros(4)],
            before=SimpleNamespace(grad_norm=1.0),
            micro_batch_size=None,
        )

    def measure_point(self, problem: Any, parts: Any, objective: Any, by_group: Any, size: Any) -> Any:
        """As `measure_point` of `problem`."""
        self.asked.append(tuple(map(math.log2, by_group)))
        loss, grad_norm, scores = self.landscape(self.asked[-1])
        if not math.isfinite(loss):
            raise NumericsError(Problem("batch", "the loss is nan", "Check"))
        parts = [GradCosine(score, grad_norm, (grad_norm,) * 2, loss, 8) for score in scores]
        return Reading(GradCosine.mean(parts), scores), size

    def run(self) -> ScanState:
        """The state at the end."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scan, "measure_point", self.measure_point)
            patch.setattr(scan, "preserving_factor", lambda model, tensors: self.factor)
            state = scan.init(self.problem)
            while not scan.finished(self.problem, state):
                told = scan.describe(self.problem, state)
                state = scan.step(self.problem, [None, None], state)
                assert state.history[-1].tried == told
                again = restored(ScanState, json.loads(json.dumps(dataclasses.asdict(state), sort_keys=True)))
                # Compared as text, where NaN equals itself.
                assert repr(again) == repr(state)
        return state


def flat(loss: Callable[[tuple[float, ...]], float], norm: Callable[[tuple[float, ...]], float] = lambda x: 1.0) -> Any:
    """A landscape whose objective is the same everywhere."""
    return lambda x: (loss(x), norm(x), (0.0, 0.0))


def trials(state: ScanState) -> list[tuple[str, str]]:
    return [(record.tried, record.outcome) for record in state.history]


# The common factor.


def test_the_common_factor_is_the_one_that_keeps_variances() -> None:
    state = Measured(flat(lambda x: 1.0 + x[0] / 10), free=0, factor=3.0).run()
    assert state.scales == pytest.approx((3.0,))
    assert trials(state) == [("start", "start"), ("all x3", "accepted")]
    assert [record.cost for record in state.history] == [2, 2]


@pytest.mark.parametrize(("factor", "expected"), [(0.3, 1.0), (1.0, 1.0), (1.1, 1.0), (1.3, 1.3), (50.0, 8.0)])
def test_the_common_factor_is_at_least_one_and_in_the_range(factor: float, expected: float) -> None:
    state = Measured(flat(lambda x: 1.0), free=0, factor=factor, scale_range=(0.01, 8.0)).run()
    assert state.scales == pytest.approx((expected,))
    assert len(state.history) == (1 if expected == 1 else 2)


def test_its_exponent_is_halved_while_a_bound_is_broken() -> None:
    state = Measured(flat(lambda x: 1.0 if x[0] <= 1.1 else 1.6), free=0, factor=16.0).run()
    assert trials(state)[1:] == [("all x16", "loss_bound"), ("all x4", "loss_bound"), ("all x2", "accepted")]
    state = Measured(flat(lambda x: 1.0, lambda x: 1 - x[0] / 4), free=0, factor=16.0).run()
    assert trials(state)[1:] == [("all x16", "norm_band"), ("all x4", "norm_band"), ("all x2", "accepted")]


def test_the_gradient_norm_may_rise_with_the_common_factor() -> None:
    assert Measured(flat(lambda x: 1.0, lambda x: 9.0 ** x[0]), free=0, factor=16.0).run().exponents == (4.0,)


@pytest.mark.parametrize("unsound", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_breaks_the_bound(unsound: float) -> None:
    state = Measured(flat(lambda x: 1.0 if x[0] < 1.3 else unsound), free=0, factor=4.0, loss_bound=None).run()
    assert state.exponents == (1.0,)
    assert trials(state)[1] == ("all x4", "loss_bound")


def test_no_common_factor_is_applied_where_none_keeps_the_bounds() -> None:
    measured = Measured(flat(lambda x: 1.0, lambda x: 1.0 if x[0] == 0 else 0.5), free=0, factor=100.0)
    state = measured.run()
    assert state.exponents == (0.0,)
    assert {outcome for _, outcome in trials(state)[1:]} == {"norm_band"}
    # Nothing costs more than this.
    assert sum(record.cost for record in state.history) == pytest.approx(scan.most_cost(measured.problem.config, 1))


# What is added.


class Balanced(Measured):
    """A scan of additive tensors and all others, with a factor for the former."""

    def __init__(self, landscape: Landscape, balance: float, **settings: Any) -> None:
        super().__init__(landscape, free=1, groups="additive", **settings)
        self.balance = balance
        self.problem.tensors.groups = {"additive": (0,), "others": (1,)}
        self.problem.theta = self.problem.initial
        self.problem.collective = None
        self.problem.place = lambda scales: setattr(self, "placed", tuple(scales))

    def run(self) -> ScanState:
        """The state at the end."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scan, "balancing_factor", lambda *args: self.balance)
            return super().run()


def test_what_is_added_is_balanced_beside_the_common_factor() -> None:
    measured = Balanced(flat(lambda x: 1.0), 8.0, factor=3.0)
    state = measured.run()
    assert measured.placed == pytest.approx((3.0, 3.0)), "the balance is that at the common factor"
    assert state.scales == pytest.approx((24.0, 3.0))
    assert trials(state) == [("start", "start"), ("additive x24, others x3", "accepted")]
    assert state.history[1].scale == pytest.approx(3.0)
    spent = sum(record.cost for record in state.history)
    assert spent == pytest.approx(2 + 2 / 3 + 2)
    assert spent <= scan.most_cost(measured.problem.config, 2)
    assert state.stage == "finished"


def test_balance_alone_is_worth_a_trial_and_the_range_holds() -> None:
    assert Balanced(flat(lambda x: 1.0), 2.0).run().scales == pytest.approx((2.0, 1.0))
    assert Balanced(flat(lambda x: 1.0), 50.0, factor=4.0).run().scales == pytest.approx((100.0, 4.0))


def test_all_exponents_are_halved_where_a_bound_is_broken() -> None:
    state = Balanced(flat(lambda x: 1.0 if x[0] <= 2.1 else 1.6), 4.0, factor=4.0).run()
    assert state.exponents == pytest.approx((2.0, 1.0))
    assert trials(state)[1:] == [("additive x16, others x4", "loss_bound"), ("additive x4, others x2", "accepted")]


# The groups.


def bowl(best: tuple[float, ...], width: float = 0.1) -> Landscape:
    """The objective falls with the distance of the free groups from a point, likewise on both batches."""

    def landscape(x: tuple[float, ...]) -> tuple[float, float, tuple[float, ...]]:
        distance = width * sum(abs(mine - other) for mine, other in zip(x, best, strict=False))
        return 1.0, 1.0, (5.0 - distance, 7.0 - distance)

    return landscape


def test_groups_move_one_after_the_other_as_long_as_the_objective_rises() -> None:
    state = Measured(bowl((3.0, -1.0)), budget=99.0).run()
    assert state.scales == (8.0, 0.5, 1.0)
    assert trials(state)[1:] == [
        ("g0 x4", "accepted"),
        ("g0 x16", "no_gain"),
        ("g0 x8", "accepted"),
        ("g1 x4", "no_gain"),
        ("g1 x2", "no_gain"),
        ("g1 x0.25", "no_gain"),
        ("g1 x0.5", "accepted"),
        # A round that changes nothing is the last.
        ("g0 x32", "no_gain"),
        ("g0 x16", "no_gain"),
        ("g0 x2", "no_gain"),
        ("g0 x4", "no_gain"),
        ("g1 x2", "no_gain"),
        ("g1 x1", "no_gain"),
        ("g1 x0.125", "no_gain"),
        ("g1 x0.25", "no_gain"),
    ]
    assert state.gains == pytest.approx((0.3, 0.1, 0.0))
    named = [(record.group, record.scale) for record in state.history[1:4]]
    assert named == [("g0", 4.0), ("g0", 16.0), ("g0", 8.0)]


def test_the_group_with_the_most_parameters_keeps_the_common_factor() -> None:
    state = Measured(bowl((2.0, -2.0, 5.0)), factor=2.0, budget=1e6, scale_range=(0.01, 2.0)).run()
    assert state.scales == (2.0, 0.25, 2.0)
    assert {record.group for record in state.history} == {None, "g0", "g1"}


def test_what_is_added_grows_though_it_has_the_most_parameters() -> None:
    measured = Measured(bowl((0.0, 3.0)), free=1, groups="additive", objective="gc", budget=1e6, scale_range=(0.1, 4.0))
    groups = {"others": (0,), "additive": (1,)}
    measured.problem.tensors.groups = groups
    state = measured.run()
    assert dict(zip(groups, state.scales, strict=True)) == {"others": 1.0, "additive": 4.0}


def test_a_single_free_group_is_gone_through_once() -> None:
    state = Measured(bowl((3.0,)), free=1, budget=1e6).run()
    assert [tried for tried, _ in trials(state)[1:]] == ["g0 x4", "g0 x16", "g0 x8"]


@examples(30)
@given(best=st.tuples(st.integers(-4, 4), st.integers(-4, 4), st.integers(-4, 4)))
def test_the_scan_ends_at_the_best_point_of_a_bowl(best: tuple[int, ...]) -> None:
    state = Measured(bowl(best), free=3, budget=1e6).run()
    assert state.exponents == (*best, 0.0)


def test_a_budget_ends_the_scan_with_the_best_so_far() -> None:
    measured = Measured(bowl((4.0, -4.0)), budget=7.0)
    state = measured.run()
    assert sum(record.cost for record in state.history) <= 7.0 < sum(r.cost for r in state.history) + 2
    assert state.scales == (16.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("scores", "outcome"),
    [
        ((0.015, 0.015), "no_gain"),
        ((0.0201, 0.0201), "accepted"),
        ((-0.1, -0.1), "no_gain"),
        ((0.3, -0.1), "noise"),
        ((0.3, 0.0), "noise"),
        ((0.3, 0.1), "accepted"),
    ],
)
def test_a_rise_must_exceed_its_noise_and_a_least_one(scores: tuple[float, ...], outcome: str) -> None:
    base = (5.0, 7.0)

    def landscape(x: tuple[float, ...]) -> tuple[float, float, tuple[float, ...]]:
        rise = scores if x == (2.0, 0.0, 0.0) else (0.0, 0.0)
        return 1.0, 1.0, (base[0] + rise[0], base[1] + rise[1])

    state = Measured(landscape).run()
    assert ("g0 x4", outcome) in trials(state)
    assert state.scales == ((4.0, 1.0, 1.0) if outcome == "accepted" else (1.0, 1.0, 1.0))


def test_bounds_hold_at_every_accepted_point_the_last_one_too() -> None:
    """The objective rises without end, and the bounds end it: that of the loss relative to the start of the run."""

    def landscape(x: tuple[float, ...]) -> tuple[float, float, tuple[float, ...]]:
        return 1.0 + 0.021 * (x[0] + x[1]), 2.0 ** (0.1 * x[0] - 0.1 * x[1]), (x[0] + x[1], x[0] + x[1] + 1)

    state = Measured(landscape, budget=1e6, loss_bound=0.1, norm_band=(0.85, 1.2)).run()
    accepted = [record for record in state.history if record.outcome == "accepted"]
    final = state.readings.current.measured
    assert len(accepted) > 1
    assert all(record.loss <= 1.1 for record in accepted)
    assert all(0.85 <= record.grad_norm <= 1.2 for record in accepted)
    assert (final.loss, final.grad_norm) == (accepted[-1].loss, accepted[-1].grad_norm)
    assert {"loss_bound", "norm_band"} <= {record.outcome for record in state.history}


def test_a_point_that_cannot_be_measured_is_refused() -> None:
    def landscape(x: tuple[float, ...]) -> tuple[float, float, tuple[float, ...]]:
        return (math.nan if x[0] > 0 else 1.0), 1.0, (x[1], x[1])

    state = Measured(landscape, budget=1e6, scale_range=(0.1, 4.0)).run()
    assert state.scales == (1.0, 4.0, 1.0)
    assert ("g0 x2", "loss_bound") in trials(state)


@pytest.mark.parametrize("scale_range", [(1.0, 1.0), (0.5, 1.0), (1.0, 1.5), (0.6, 1.9), (0.25, 2.0)])
def test_no_scale_out_of_range_is_tried(scale_range: tuple[float, float]) -> None:
    for best in itertools.product((-9.0, 0.0, 9.0), repeat=2):
        measured = Measured(bowl(best), budget=1e6, scale_range=scale_range)
        state = measured.run()
        tried = [2.0**x for point in measured.asked for x in point]
        assert scale_range[0] <= min(tried) <= max(tried) <= scale_range[1]
        for scale, wanted in zip(state.scales, best, strict=False):
            reachable = [1.0, *(2.0**n for n in range(-9, 9) if scale_range[0] <= 2.0**n <= scale_range[1])]
            assert scale == {-9.0: min(reachable), 0.0: 1.0, 9.0: max(reachable)}[wanted]


@st.composite
def landscapes(draw: st.DrawFn) -> Landscape:
    """Smooth landscapes: their loss, their norm and their objective are plain functions of random directions."""
    number = st.floats(-1.0, 1.0)
    loss, norm, score, curve = (draw(st.tuples(number, number, number)) for _ in range(4))
    noise = draw(st.floats(0.0, 0.5))

    def landscape(x: tuple[float, ...]) -> tuple[float, float, tuple[float, ...]]:
        dot = lambda w: sum(a * b for a, b in zip(w, x, strict=True))  # noqa: E731
        value = math.sin(dot(score)) + 0.1 * dot(curve)
        return 2.0 + math.tanh(dot(loss)) / 2, math.exp(dot(norm) / 3), (value, value + noise * math.sin(3 * x[0]))

    return landscape


@examples(60)
@given(
    landscape=landscapes(),
    loss_bound=st.sampled_from([None, 0.05, 0.3]),
    norm_band=st.sampled_from([None, (0.8, 1.5), (0.5, 1.0)]),
    scale_range=st.sampled_from([(0.01, 100.0), (0.3, 3.0), (0.5, 1.0)]),
    budget=st.sampled_from([5.0, 24.0, 200.0]),
    factor=st.sampled_from([0.5, 1.0, 2.7, 30.0]),
)
def test_what_a_scan_promises_on_any_landscape(
    landscape: Landscape, loss_bound: Any, norm_band: Any, scale_range: Any, budget: float, factor: float
) -> None:
    settings = {"loss_bound": loss_bound, "norm_band": norm_band, "scale_range": scale_range, "budget": budget}
    measured = Measured(landscape, factor=factor, **settings)
    state, config = measured.run(), measured.problem.config
    loss, grad_norm, _ = landscape(tuple(map(math.log2, state.scales)))
    common = [record for record in state.history if record.group is None and record.outcome == "accepted"]
    base = landscape((math.log2(common[0].scale),) * 3 if common else (0.0,) * 3)
    start = landscape((0.0,) * 3)
    if loss_bound is not None:
        assert loss <= (1 + loss_bound) * start[0] + 1e-12
        assert base[0] <= (1 + loss_bound) * start[0] + 1e-12
    if norm_band is not None:
        assert norm_band[0] * start[1] <= base[1] * (1 + 1e-12)
        assert norm_band[0] * base[1] <= grad_norm * (1 + 1e-12)
        assert grad_norm <= norm_band[1] * base[1] * (1 + 1e-12)
    assert all(scale_range[0] <= 2.0**x <= scale_range[1] for point in measured.asked for x in point)
    assert sum(landscape(tuple(map(math.log2, state.scales)))[2]) >= sum(base[2]) - 1e-12
    spent = sum(record.cost for record in state.history)
    assert spent <= scan.most_cost(config, 3) + 1e-9


# A small model.


@pytest.mark.parametrize("objective", ["gc", "variance"])
@pytest.mark.parametrize(
    ("best", "levels", "settings"),
    [
        ((4.0, 0.25), (0.05, 1.0), {}),
        ((0.5, 0.125), (1.0, 1.0), {}),
        # A bound on the loss keeps the first scale below its best for as long as the second is large.
        ((4.0, 0.25), (0.1, 1.0), {"loss_bound": 0.05}),
        ((4.0, 1.0), (0.05, 0.3), {"loss_bound": 1.0}),
        ((9.0, 0.1), (0.01, 1.0), {"scale_range": (0.5, 2.0)}),
        ((0.25, 4.0), (1.0, 0.1), {"norm_band": (0.9, 1.1)}),
    ],
)
def test_the_scan_finds_the_best_of_a_grid(objective: Any, best: Any, levels: Any, settings: dict[str, Any]) -> None:
    given = {"loss_bound": 0.2, "norm_band": (0.5, 2.0), "scale_range": (1 / 32, 32.0), "budget": 1e4, **settings}
    config = NIOConfig(groups="tensor", objective=objective, sub_batches=4, search_batches=3, **given)
    batches = Agreement.batches(7)
    # The first of layers of one size keeps the common factor.
    made = [Agreement((1.0, *best), (0.0, *levels)) for _ in range(2)]
    result = initialize(made[0], batches, Agreement.loss, config)
    common = [r.scale for r in result.history if r.group is None and r.outcome == "accepted"]
    body, *found = [math.log2(group.omega) for group in result.groups]
    assert body == pytest.approx(math.log2(common[0]) if common else 0.0)
    wanted = brute_force(made[1], batches[0], config, body)
    assert all(abs(mine - other) <= 1 + 1e-9 for mine, other in zip(found, wanted, strict=True)), (found, wanted)
    assert any(each != body for each in found)
    assert any(each != body for each in wanted)


def brute_force(model: Agreement, batch: Any, config: NIOConfig, common: float) -> tuple[float, ...]:
    """log2 of the scales of the best point of a grid of doublings around a common factor, within the bounds."""
    start, stage = (model.measured((x,) * 3, batch, config.objective) for x in (0.0, common))
    least, largest = (math.log2(bound) for bound in config.scale_range)
    points = [common + step for step in range(-7, 8) if least <= common + step <= largest]
    best, best_score = (common, common), stage[2]
    for exponents in itertools.product(points, repeat=2):
        loss, norm, score = model.measured((common, *exponents), batch, config.objective)
        within = config.norm_band[0] * stage[1] <= norm <= config.norm_band[1] * stage[1]
        if within and loss <= start[0] * (1 + config.loss_bound) and score > best_score:
            best, best_score = exponents, score
    return best


def test_a_scan_of_a_model_goes_on_exactly_after_a_trip_through_json() -> None:
    made = case("mlp")
    config = NIOConfig(groups="kind", sub_batches=2, search_batches=2, budget=14.0)
    with scaling_problem(made.model, made.loss_fn, config) as problem:
        parts = search_parts(problem, [made.batch, case("mlp", 12).batch])
        states = [scan.init(problem)]
        while not scan.finished(problem, states[-1]):
            again = restored(ScanState, json.loads(json.dumps(dataclasses.asdict(states[-1]))))
            states.append(scan.step(problem, parts, again))
    assert states[-1].stage == "groups"
    assert len(states) > 5
