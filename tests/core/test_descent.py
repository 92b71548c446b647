"""The gradient search: its gradient against slopes of the score, its steps by hand, and a model whose best is known."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nio_hf.core.descent import DescentState
from torch import Tensor, nn

from nio_hf import GradCosine, NIOConfig, grad_cosine, initialize
from nio_hf.core import descent
from nio_hf.core.adam import AdamState, adam_step
from nio_hf.core.curvature import Path
from nio_hf.core.objectives import make_objective
from nio_hf.core.problem import ScalingProblem, measure_point, search_parts
from nio_hf.core.records import restored
from nio_hf.core.result import Reading
from nio_hf.errors import NumericsError
from tests.core.cases import Agreement, Case, batches_of, case, double_case, scaling_problem

UNBOUNDED: dict[str, Any] = {"loss_bound": None, "norm_band": None}


@contextlib.contextmanager
def started(made: Case, batches: Sequence[Any], **settings: Any) -> Iterator[tuple[ScalingProblem, list[Any]]]:
    """A problem whose gradient norm at the start is 3, and its search batches."""
    config = NIOConfig(search="gradient", sub_batches=2, **UNBOUNDED, **settings)
    with scaling_problem(made.model, made.loss_fn, config, grad_norm=3.0) as problem:
        yield problem, search_parts(problem, batches)


def gradient_at(problem: ScalingProblem, parts: list[Any], logs: Sequence[float]) -> tuple[float, Tensor]:
    """Score at a point, and the gradient of minus the score by log omega, as the first step of Adam takes it."""
    state = dataclasses.replace(descent.init(problem), logs=tuple(logs))
    state = descent.step(problem, parts, state)
    assert state.history[-1].outcome == "start"
    assert state.history[-1].objective == (None if problem.config.objective == "gc" else state.best.score)
    return state.best.score, torch.tensor(state.adam.first["objective"], dtype=torch.float64) / 0.1


@pytest.mark.parametrize("objective", ["gc", "gc_norm", "gc_sum_norm", "variance"])
@pytest.mark.parametrize(("name", "groups"), [("mlp", "tensor"), ("vit", "kind"), ("gpt2", "kind")])
def test_the_gradient_is_the_slope_of_the_score(name: str, groups: Any, objective: Any) -> None:
    made, batches = double_case(name, 6), batches_of(name, 2, 6)
    own = make_objective(objective, 2, 3.0)
    with started(made, batches, objective=objective, groups=groups) as (problem, parts):
        count = len(problem.tensors.groups)
        logs = torch.sin(1.0 + torch.arange(count, dtype=torch.float64)) * 0.3

        def score(at: Tensor) -> float:
            return measure_point(problem, parts, own, at.exp().tolist(), None)[0].score

        steps = 1e-4 * torch.eye(count, dtype=torch.float64)
        slopes = torch.tensor([(score(logs + step) - score(logs - step)) / 2e-4 for step in steps], dtype=torch.float64)
        expected = score(logs)
    assert count > 2
    assert float(slopes.norm()) > 1e-3
    for curvature in ("exact", "finite_difference"):
        with started(made, batches, objective=objective, groups=groups, curvature=curvature) as (problem, parts):
            found, gradient = gradient_at(problem, parts, logs.tolist())
        assert found == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(gradient, -slopes, rtol=1e-4, atol=1e-6)


# Steps, on landscapes that are made up.


def run(
    monkeypatch: pytest.MonkeyPatch, landscape: Any, groups: int = 2, **settings: Any
) -> tuple[DescentState, list[tuple[float, ...]]]:
    """The state at the end of a search on a landscape, logs -> (loss, norm, score, gradient), and what it asked for."""
    asked: list[tuple[float, ...]] = []

    def measure(problem: Any, parts: Any, by_group: Any, path: Any, state: DescentState) -> Any:
        asked.append(tuple(map(math.log, by_group)))
        loss, grad_norm, score, gradient = landscape(asked[-1])
        if not math.isfinite(loss):
            return None, torch.zeros(groups), None
        parts = [GradCosine(score, grad_norm, (grad_norm,) * 2, loss, 8)] * 2
        return Reading(GradCosine.mean(parts), (score, score)), torch.tensor(gradient, dtype=torch.float64), None

    monkeypatch.setattr(descent, "_measure", measure)
    monkeypatch.setattr(descent, "choose_path", lambda *args: Path("exact"))
    config = NIOConfig(search="gradient", groups="kind", **{**UNBOUNDED, **settings})
    tensors = SimpleNamespace(groups={f"g{index}": (index,) for index in range(groups)})
    problem: Any = SimpleNamespace(config=config, tensors=tensors, loss=None, micro_batch_size=None)
    state = descent.init(problem)
    while not descent.finished(problem, state):
        told = descent.describe(problem, state)
        state = descent.step(problem, [None, None], state)
        assert state.history[-1].tried == told
        again = restored(DescentState, json.loads(json.dumps(dataclasses.asdict(state))))
        assert repr(again) == repr(state)
    return state, asked


def test_accepted_steps_are_those_of_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    def landscape(x: tuple[float, ...]) -> Any:
        return 1.0, 1.0, x[0] + 2 * x[1] - x[0] ** 2 / 9, (2 * x[0] / 9 - 1, -2.0)

    state, asked = run(monkeypatch, landscape, iterations=6, lr=0.2)
    assert [record.outcome for record in state.history] == ["start", *["accepted"] * 5]
    adam, point = AdamState.zeros(2), torch.zeros(2, dtype=torch.float64)
    for expected in asked:
        assert list(expected) == pytest.approx(point.tolist(), abs=1e-12)
        gradient = torch.tensor(landscape(expected)[3], dtype=torch.float64)
        # Without clipping: Adam takes the size of a gradient out by itself.
        direction, adam = adam_step(adam, gradient, clip=None)
        point = point + 0.2 * direction
    assert state.scales == pytest.approx([math.exp(log) for log in asked[-1]])
    assert {record.cost for record in state.history} == {8.0}


def test_a_step_that_is_refused_is_halved_and_taken_again_from_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    def landscape(x: tuple[float, ...]) -> Any:
        return 1.0, 1.0, -abs(x[0] - 0.3), (-1.0, 0.0)

    state, asked = run(monkeypatch, landscape, iterations=30, lr=0.8)
    assert [point[0] for point in asked[:4]] == pytest.approx([0.0, 0.8, 0.4, 0.4 + 0.4], abs=1e-6)
    outcomes = [record.outcome for record in state.history]
    assert outcomes[:4] == ["start", "worse", "accepted", "worse"]
    # Steps of 0.8 / 2^k: all but the first are refused, and the search ends where they are too small.
    assert len(state.history) < 30
    assert [record.tried for record in state.history[:3]] == ["start", "a step of 0.8", "a step of 0.4"]
    assert state.share < descent.LEAST_STEP_SHARE
    assert state.scales[0] == pytest.approx(math.exp(0.4), rel=1e-6)


@pytest.mark.parametrize("iterations", [2, 3, 4, 12])
def test_bounds_hold_at_the_point_that_is_given_whatever_step_is_last(
    iterations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def landscape(x: tuple[float, ...]) -> Any:
        return 1 + 0.2 * x[0], math.exp(-x[1] / 2), x[0] + x[1], (-1.0, -1.0)

    settings = {"loss_bound": 0.1, "norm_band": (0.9, 1.5), "lr": 0.15}
    state, asked = run(monkeypatch, landscape, iterations=iterations, **settings)
    loss, grad_norm, score, _ = landscape(tuple(map(math.log, state.scales)))
    assert loss <= 1.1
    assert 0.9 <= grad_norm <= 1.5
    within = [x for x in asked if landscape(x)[0] <= 1.1 and landscape(x)[1] >= 0.9]
    assert score == pytest.approx(max(landscape(x)[2] for x in within))
    if iterations > 3:
        assert state.history[-1].outcome == "norm_band"
        assert score > 0.15


def test_points_that_cannot_be_measured_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def landscape(x: tuple[float, ...]) -> Any:
        return (1.0 if x[0] < 0.3 else math.nan), 1.0, x[0], (-1.0, 0.0)

    state, _ = run(monkeypatch, landscape, iterations=9, lr=0.5)
    assert state.history[1].outcome == "loss_bound"
    assert math.isnan(state.history[1].loss)
    assert state.history[1].grad_cosine is None
    assert 1.0 < state.scales[0] < math.exp(0.3)


def test_scales_stay_within_their_range(monkeypatch: pytest.MonkeyPatch) -> None:
    def landscape(x: tuple[float, ...]) -> Any:
        return 1.0, 1.0, x[0] - x[1], (-1.0, 1.0)

    state, asked = run(monkeypatch, landscape, iterations=9, lr=0.5, scale_range=(0.5, 1.5))
    assert state.scales == pytest.approx((1.5, 0.5))
    assert all(math.log(0.5) <= x <= math.log(1.5) for point in asked for x in point)


@pytest.mark.parametrize(("rises", "applied"), [((0.3, 0.1), True), ((0.3, -0.1), False), ((0.3, 0.0), False)])
def test_a_point_that_is_better_within_the_noise_only_is_not_applied(rises: tuple[float, float], applied: bool) -> None:
    def reading(*scores: float) -> Reading:
        return Reading(GradCosine.mean([GradCosine(0.1, 1.0, (1.0, 1.0), 1.0, 8)] * 2), scores)

    state = DescentState(
        (0.5, -0.5),
        reading(2 + rises[0], 5 + rises[1]),
        reading(2.0, 5.0),
        (0.0, 0.0),
        1.0,
        AdamState.zeros(2),
        None,
        (),
        None,
    )
    assert state.scales == ((math.exp(0.5), math.exp(-0.5)) if applied else (1.0, 1.0))
    assert dataclasses.replace(state, best=None, start=None).scales == (1.0, 1.0)


def test_a_start_that_cannot_be_measured_is_an_error() -> None:
    made = case("mlp")
    seen: list[None] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append(None)
        return made.loss_fn(model, batch) * (float("nan") if len(seen) > 9 else 1.0)

    config = NIOConfig(search="gradient", sub_batches=2, report_batches=2)
    with pytest.raises(NumericsError, match=r"search batch \d, sub-batch \d: the loss is nan"):
        initialize(made.model, batches_of("mlp", 6), loss_fn, config)


# A small model.

GRID = 0.25
"""Step of the grid in log2. The search ends where a step in the last direction no longer helps, not at a slope of 0."""


@pytest.mark.parametrize("objective", ["gc", "variance"])
@pytest.mark.parametrize(
    ("best", "levels", "settings"),
    [
        ((2.3, 0.6), (0.1, 1.0), {}),
        ((0.5, 0.4), (1.0, 1.0), {}),
        ((9.0, 0.1), (0.01, 1.0), {"scale_range": (0.5, 2.0)}),
        # The bound on the loss, which ends the search.
        ((2.5, 1.0), (1.0, 0.0), {"loss_bound": 0.3}),
    ],
)
def test_the_search_finds_the_best_of_a_grid(objective: Any, best: Any, levels: Any, settings: dict[str, Any]) -> None:
    given = {"loss_bound": 0.2, "norm_band": (0.5, 2.0), "scale_range": (1 / 8, 8.0), **settings}
    config = NIOConfig(
        search="gradient", groups="tensor", objective=objective, search_batches=2, iterations=40, lr=0.1, **given
    )
    batches = Agreement.batches(6)
    result = initialize(Agreement(best, levels), batches, Agreement.loss, config)
    found = [math.log2(group.omega) for group in result.groups]
    wanted = brute_force(Agreement(best, levels), batches[0], config)
    assert found == pytest.approx(wanted, abs=GRID), (found, wanted)
    assert wanted != [0.0, 0.0]


def brute_force(model: Agreement, batch: Tensor, config: NIOConfig) -> list[float]:
    """log2 of the scales of the best point of a fine grid, within the bounds."""
    start = model.measured((0.0, 0.0), batch, config.objective)
    least, largest = (math.log2(bound) for bound in config.scale_range)
    points = [least + GRID * step for step in range(round((largest - least) / GRID) + 1)]
    within = {}
    for exponents in itertools.product(points, repeat=2):
        loss, norm, score = model.measured(exponents, batch, config.objective)
        in_band = config.norm_band[0] * start[1] <= norm <= config.norm_band[1] * start[1]
        if in_band and loss <= start[0] * (1 + config.loss_bound):
            within[exponents] = score
    return list(max(within, key=within.__getitem__))


def test_a_run_of_a_model_ends_at_the_best_that_it_measured() -> None:
    made, batches = double_case("mlp"), batches_of("mlp", 5)
    config = NIOConfig(
        search="gradient", groups="tensor", sub_batches=2, search_batches=3, report_batches=2, iterations=12
    )
    result = initialize(made.model, batches, made.loss_fn, config)
    accepted = [record for record in result.history if record.outcome == "accepted"]
    measured = [grad_cosine(made.model, batch, made.loss_fn, sub_batches=2) for batch in batches[2:]]
    assert sum(one.value for one in measured) / 3 == pytest.approx(accepted[-1].grad_cosine, rel=1e-9)
    assert sum(one.loss for one in measured) / 3 == pytest.approx(accepted[-1].loss, rel=1e-9)
    scores = [record.grad_cosine for record in result.history if record.outcome in ("start", "accepted")]
    assert scores == sorted(scores)
    assert len(scores) > 3
