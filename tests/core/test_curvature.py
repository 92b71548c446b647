"""What the paths to the Hessian-vector products compute, cost and keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.accounting import counted
from nio_hf import NIOConfig, initialize
from nio_hf.core import Collective, LayerScales
from nio_hf.core.curvature import make_path
from nio_hf.core.differentiator import Differentiator
from nio_hf.core.mode import measuring
from nio_hf.core.objectives import CosineObjective, NormConstraint, Objective
from nio_hf.core.reference import joint_graph
from nio_hf.core.two_pass import TwoPass
from tests.core.cases import Case, batches_of, case, differences, double_case, state


def scale_gradient(
    made: Case,
    sub_batches: int,
    curvature: Any,
    *,
    micro_batch_size: int | None = None,
    objective: Objective = CosineObjective(),  # noqa: B008
) -> Tensor:
    """dJ/domega of a batch by one path."""
    scales = LayerScales(made.model)
    differentiator = Differentiator(made.model, made.loss_fn, scales, micro_batch_size)
    passes = TwoPass(made.model, differentiator, scales, Collective(), "batch")
    path = make_path(curvature, differentiator, made.batch, sub_batches)
    with measuring(made.model):
        parts = passes.split(made.batch, sub_batches)
        sums = passes.first_pass(path, parts, "")
        initial = [parameter.detach() for parameter in scales.scaled]
        return passes.second_pass(path, parts, sums, objective, initial, "")


@pytest.mark.parametrize("objective", [CosineObjective(), NormConstraint()], ids=["objective", "constraint"])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
@pytest.mark.parametrize("curvature", ["finite_difference", "finite_difference_kept"])
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_finite_differences_are_close_to_exact(
    name: str, curvature: str, micro_batch_size: int | None, objective: Objective
) -> None:
    made = case(name)
    before = state(made.model)
    exact = scale_gradient(made, 2, "exact", objective=objective)
    approximate = scale_gradient(made, 2, curvature, micro_batch_size=micro_batch_size, objective=objective)
    assert (approximate - exact).norm() < 1e-2 * exact.norm()
    assert not torch.equal(approximate, exact)
    assert not differences(before, state(made.model))


def test_finite_differences_in_fp64_are_closer() -> None:
    made = double_case("swin")
    exact, approximate = (scale_gradient(made, 4, path) for path in ("exact", "finite_difference"))
    assert (approximate - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize(
    ("curvature", "micro_batch_size", "calls"),
    [
        ("exact", None, 2),
        ("exact_kept", None, 1),
        ("finite_difference", None, 4),
        ("finite_difference_kept", None, 3),
        # Two micro-batches, each computed in pass 1, for g_d again, and for the product.
        ("exact", 2, 6),
        ("finite_difference_kept", 2, 6),
    ],
)
@pytest.mark.parametrize("sub_batches", [2, 3])
def test_losses_computed_per_sub_batch(
    curvature: str, micro_batch_size: int | None, calls: int, sub_batches: int
) -> None:
    made = case("mlp", 4 * sub_batches)
    seen: list[int] = []

    def recorded(model: Any, batch: Any) -> Any:
        seen.append(len(batch[1]))
        return made.loss_fn(model, batch)

    scale_gradient(Case(made.model, made.batch, recorded), sub_batches, curvature, micro_batch_size=micro_batch_size)
    assert len(seen) == calls * sub_batches
    assert set(seen) == {micro_batch_size or 4}


@pytest.mark.parametrize("curvature", ["exact", "finite_difference"])
def test_peak_memory_does_not_grow_with_the_number_of_sub_batches(curvature: str) -> None:
    def run(made: Case, sub_batches: int) -> None:
        scale_gradient(made, sub_batches, curvature)

    few, many = (_peak_bytes(run, sub_batches) for sub_batches in (2, 8))
    assert many < 1.02 * few


def test_peak_memory_of_the_joint_graph_and_of_kept_graphs_grows() -> None:
    def joint(made: Case, sub_batches: int) -> None:
        names = [name for name, _ in made.model.named_parameters() if "weight" in name]
        windows = [range(2 * d, 2 * d + 2) for d in range(sub_batches)]
        with measuring(made.model):
            losses_fn = lambda model: [made.mean_loss(window, model) for window in windows]  # noqa: E731
            joint_graph(made.model, losses_fn, gradient=names, scaled=names)

    def kept(made: Case, sub_batches: int) -> None:
        scale_gradient(made, sub_batches, "exact_kept")

    for run in (joint, kept):
        few, many = (_peak_bytes(run, sub_batches) for sub_batches in (2, 8))
        assert many > 2 * few, run


def _peak_bytes(run: Callable[[Case, int], None], sub_batches: int) -> int:
    """Peak of the memory allocated while it runs on sub-batches of two sentences, whose tokens take next to none."""
    made = case("gpt2", 2 * sub_batches)
    return counted(lambda: run(made, sub_batches)).peak


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_bfloat16_autocast_is_near_and_reaches_the_loss(name: str) -> None:
    made = case(name, 16)
    seen = set()

    def loss_fn(model: Any, batch: Any) -> Tensor:
        seen.add(torch.is_autocast_enabled("cpu"))
        return made.loss_fn(model, batch)

    scales = {}
    for precision in ("fp32", "bf16"):
        own = case(name, 16)
        config = NIOConfig(iterations=2, holdout_batches=1, sub_batches=2, precision=precision)
        scales[precision] = initialize(own.model, [own.batch] * 3, loss_fn, config)
    assert seen == {False, True}
    assert scales["bf16"].before.value == pytest.approx(scales["fp32"].before.value, abs=0.02)
    assert scales["bf16"].before.value != scales["fp32"].before.value


def test_bfloat16_sees_the_weights_as_they_are() -> None:
    """Autocast keeps cast weights, and NIO changes weights without its notice."""
    made, batches = case("vit"), batches_of("vit", 5)
    settings: dict[str, Any] = {"sub_batches": 2, "holdout_batches": 2, "precision": "bf16", "curvature": "exact"}
    first = initialize(made.model, batches, made.loss_fn, NIOConfig(iterations=3, lr=0.1, **settings))
    assert first.after.value != first.before.value
    again = initialize(made.model, batches, made.loss_fn, NIOConfig(iterations=1, **settings))
    assert (again.before.value, again.before.loss) == (first.after.value, first.after.loss)
