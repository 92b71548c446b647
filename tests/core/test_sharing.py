"""Scales that tensors share, and tensors that have none."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from typing import Any

import pytest
import torch

from nio_hf.core import NIOConfig, initialize
from nio_hf.core.gradcosine import sub_batch_windows
from nio_hf.core.loop import iteration_seed
from nio_hf.core.mode import measuring
from nio_hf.core.reference import joint_graph
from nio_hf.core.scales import LayerScales
from nio_hf.errors import ModelError
from tests.core.cases import Case, batches_of, double_case

LR, ITERATIONS, SAMPLES = 0.05, 3, 8


def _names(model: torch.nn.Module, parameters: list[Any]) -> list[str]:
    by_identity = {id(parameter): name for name, parameter in model.named_parameters()}
    return [by_identity[id(parameter)] for parameter in parameters]


def _oracle(name: str, sharing: str) -> dict[str, float]:
    """The scales of a few iterations with the joint graph and torch's own Adam on the scales that are shared."""
    made = double_case(name, SAMPLES)
    scales = LayerScales(made.model, "weights")
    scaled, gradient = _names(made.model, scales.scaled), _names(made.model, scales.gradient)
    kinds = [place.kind for place in scales._scaled]
    groups = [kind if sharing == "kind" else "all" for kind in kinds]
    shared = {group: torch.ones((), dtype=torch.float64) for group in groups}
    adam = torch.optim.Adam(list(shared.values()), lr=LR)
    weights = {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}
    batches = batches_of(name, 1 + ITERATIONS, SAMPLES)[1:]
    for iteration, batch in enumerate(batches, 1):
        seed = iteration_seed(0, iteration)
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed)).tolist()
        model = copy.deepcopy(made.model)
        with torch.no_grad():
            for parameter_name, group in zip(scaled, groups, strict=True):
                model.get_parameter(parameter_name).copy_(shared[group] * weights[parameter_name])
        current = dataclasses.replace(made, batch=batch)

        def losses(model: torch.nn.Module, current: Case = current, order: list[int] = order) -> list[torch.Tensor]:
            return [current.mean_loss([order[i] for i in window], model) for window in sub_batch_windows(SAMPLES, 4)]

        with measuring(model):
            found = joint_graph(model, losses, gradient=gradient, scaled=scaled)
        # The oracle differentiates at omega = 1 of the weights as they are: by the chain rule over the scale so far.
        for group, scale in shared.items():
            own = [i for i, other in enumerate(groups) if other == group]
            total = found.scale_gradient[own].sum() / scale
            scale.grad = total.clamp(-1, 1)
        adam.step()
    return {name: float(shared[group]) for name, group in zip(scaled, groups, strict=True)}


@pytest.mark.parametrize("sharing", ["kind", "model"])
def test_shared_scales_are_those_of_the_oracle(sharing: Any) -> None:
    expected = _oracle("vit", sharing)
    made = double_case("vit", SAMPLES)
    config = NIOConfig(
        iterations=ITERATIONS,
        lr=LR,
        gamma_relative=None,
        holdout_batches=1,
        objective="gc",
        scaled_tensors="weights",
        scale_sharing=sharing,
    )
    batches = batches_of("vit", 1 + ITERATIONS, SAMPLES)
    result = initialize(made.model, batches, made.loss_fn, config)
    assert result.scales.keys() == expected.keys()
    for name, scale in result.scales.items():
        assert math.isclose(scale, expected[name], rel_tol=1e-9), name


@pytest.mark.parametrize("name", ["vit", "swin", "resnet", "gpt2"])
def test_one_scale_for_the_model_leaves_vectors_alone(name: str) -> None:
    made = double_case(name)
    before = {key: value.clone() for key, value in made.model.state_dict().items()}
    config = NIOConfig(iterations=2, lr=0.1, holdout_batches=1, scaled_tensors="weights", scale_sharing="model")
    result = initialize(made.model, batches_of(name, 3), made.loss_fn, config)
    (omega,) = set(result.scales.values())
    assert omega != 1
    for key, parameter in made.model.named_parameters():
        factor = omega if key in result.scales else 1
        assert torch.equal(parameter, before[key] * factor)
        assert (key in result.scales) <= (parameter.ndim >= 2)
    assert {tensor.reason for tensor in result.excluded if len(tensor.shape) < 2} <= {"vector", "zero"}


def test_tensors_of_a_kind_share_theirs() -> None:
    made = double_case("vit")
    config = NIOConfig(iterations=2, lr=0.1, holdout_batches=1, scale_sharing="kind")
    result = initialize(made.model, batches_of("vit", 3), made.loss_fn, config)
    by_kind: dict[str, set[float]] = {}
    for tensor in result.tensors:
        by_kind.setdefault(tensor.kind, set()).add(tensor.omega)
    assert len(by_kind) > 2
    assert all(len(scales) == 1 for scales in by_kind.values())
    assert len({scales.copy().pop() for scales in by_kind.values()}) > 1


@pytest.mark.parametrize("pattern", ["attention", r"o_proj|fc2", r"layers\.1\."])
def test_only_tensors_of_a_name_are_scaled(pattern: str) -> None:
    made = double_case("vit")
    config = NIOConfig(iterations=2, lr=0.1, holdout_batches=1, scaled_tensors="weights", scaled_names=pattern)
    result = initialize(made.model, batches_of("vit", 3), made.loss_fn, config)
    matrices = [name for name, parameter in made.model.named_parameters() if parameter.ndim >= 2]
    excluded = [tensor.name for tensor in result.excluded if tensor.reason == "name"]
    assert list(result.scales) == [name for name in matrices if re.search(pattern, name)]
    assert {*excluded, *result.scales} == set(matrices)


def test_a_pattern_that_no_tensor_has_is_refused() -> None:
    made = double_case("vit")
    with pytest.raises(ModelError, match=r"no tensor can be scaled.*name"):
        initialize(made.model, batches_of("vit", 3), made.loss_fn, NIOConfig(scaled_names="decoder"))
