"""The variance of the weights, and the learning rate against an enumeration of all paths."""

from __future__ import annotations

import collections
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nio_hf.baselines import architecture_aware, maximal_learning_rate, residual_path_depths
from nio_hf.baselines.tensors import layer_weights
from nio_hf.core import NIOConfig
from nio_hf.core.scales import LayerScales
from nio_hf.errors import ConfigError, ModelError
from nio_hf.training.layers import register_transformers_layers
from tests import zoo
from tests.core.cases import batches_of, case

CONFIG = NIOConfig(sub_batches=2, holdout_batches=1)


@pytest.mark.parametrize("name", ["mlp", "vit", "resnet", "gpt2"])
def test_weights_have_the_variance_of_the_paper(name: str) -> None:
    made, before = case(name), case(name).model
    result = architecture_aware(made.model, batches_of(name, 2), made.loss_fn, CONFIG)
    ends = ("o_proj.weight", "fc2.weight", "c_proj.weight", "layer.1.convolution.weight", "shortcut.convolution.weight")
    count = 0
    for tensor in result.tensors:
        weight = made.model.get_parameter(tensor.name).detach()
        torch.testing.assert_close(weight, tensor.omega * before.get_parameter(tensor.name).detach())
        if weight.ndim > 1 and tensor.kind.startswith(("linear", "convolution")):
            fan_in = weight.shape[0] if name == "gpt2" else weight[0].numel()
            expected = 2 / (fan_in * (2 if tensor.name.endswith(ends) else 1))
            assert weight.square().mean().item() == pytest.approx(expected, rel=1e-4), tensor.name
            count += 1
        else:
            assert tensor.omega == 1
    assert count >= 3


def test_a_residual_chain_of_relus_keeps_its_second_moment() -> None:
    """What the in-degree is for: without it the second moment would double with every block."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(256, 256, bias=False)
            self.shortcut = nn.Linear(256, 256, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layer(x) + self.shortcut(x))

    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(8)), nn.Linear(256, 5))
    batch = zoo.vectors(32, inputs=256)
    architecture_aware(model, [batch], zoo.vector_loss, CONFIG, holdout=[batch])
    sizes = [x.square().mean().item() for x in itertools.accumulate(model[:8], lambda x, f: f(x), initial=batch[0])]
    assert sizes[-1] == pytest.approx(sizes[1], rel=0.4)


def test_the_gain_is_that_of_the_option() -> None:
    made = case("mlp")
    architecture_aware(made.model, batches_of("mlp", 2), made.loss_fn, CONFIG, gain=1.0)
    assert made.model.get_parameter("4.weight").square().mean().item() == pytest.approx(1 / 8)


def test_a_chain_follows_the_law_of_three_halves() -> None:
    for depth in (1, 2, 8, 50):
        assert maximal_learning_rate(0.1, {4: 1}, {depth: 1}) == pytest.approx(0.1 * (depth / 4) ** -1.5)
    assert maximal_learning_rate(0.1, {4: 1}, {4: 1}, base_kernel=3, kernel=5) == pytest.approx(0.1 * 3 / 5)
    assert maximal_learning_rate(0.1, {4: 1}, {4: 9}) == pytest.approx(0.1 / 3), "paths add up"


@pytest.mark.parametrize(("stem", "branches"), [(0, []), (1, [1]), (2, [2, 2, 2]), (3, [1, 2, 3, 2]), (2, [2] * 8)])
def test_paths_of_residual_blocks_are_those_of_an_enumeration(stem: int, branches: list[int]) -> None:
    taken = itertools.product([False, True], repeat=len(branches))
    depths = [stem + sum(depth for depth, on in zip(branches, path, strict=True) if on) for path in taken]
    paths = residual_path_depths(stem, branches)
    assert paths == dict(collections.Counter(depths))
    assert list(paths) == sorted(paths)
    if stem:
        expected = sum(depth**3 for depth in depths) ** -0.5
        assert maximal_learning_rate(1.0, {1: 1}, paths) == pytest.approx(expected)


def test_paths_of_a_vit() -> None:
    paths = residual_path_depths(2, [2] * 24)
    assert paths == {2 + 2 * j: math.comb(24, j) for j in range(25)}
    assert maximal_learning_rate(1e-3, paths, residual_path_depths(2, [2] * 12)) > 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: maximal_learning_rate(0.0, {1: 1}, {}, kernel=0), "3 problems"),
        (lambda: maximal_learning_rate(0.1, {0: 1}, {1: 1}), r"maximal_learning_rate\.base_paths: \{0: 1\}"),
        (lambda: residual_path_depths(-1, [2]), r"residual_path_depths\.stem: -1"),
        (lambda: residual_path_depths(1, [2, 0]), r"residual_path_depths\.branches: \[2, 0\]"),
    ],
)
def test_what_is_out_of_range_is_named(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (nn.Linear(6, 4), 6),
        (nn.Linear(6, 4, bias=False), 6),
        (nn.Conv2d(6, 4, (3, 2)), 36),
        (nn.Conv2d(6, 4, 3, groups=2), 27),
        (nn.ConvTranspose2d(6, 4, 3, groups=2), 27),
        (nn.Bilinear(6, 3, 4), 18),
    ],
)
def test_fan_in(layer: nn.Module, fan_in: int) -> None:
    [weight] = layer_weights(layer, LayerScales(layer))
    assert weight.fan_in == fan_in


def test_fan_in_of_a_layer_with_its_inputs_along_dimension_0() -> None:
    from transformers.pytorch_utils import Conv1D

    register_transformers_layers()
    layer = Conv1D(4, 6)
    assert layer_weights(layer, LayerScales(layer))[0].fan_in == 6


def test_a_model_without_weights_of_layers_is_refused() -> None:
    model = nn.Sequential(nn.LayerNorm(6))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[0].roll(1)).square().mean()

    with pytest.raises(ModelError, match=r"Sequential: no layer has a weight to initialise"):
        architecture_aware(model, batches_of("mlp", 2), loss_fn, CONFIG)
