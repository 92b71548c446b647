"""The factors of the layers, and what they leave unchanged."""

import itertools

import pytest
import torch
from torch import nn

from nio_hf.baselines import METHODS
from nio_hf.core import NIOConfig, initialize
from tests import zoo
from tests.core.cases import batches_of, case

CONFIG = NIOConfig(sub_batches=2, report_batches=1)


def run(model, batches, loss_fn, **options):
    return initialize(model, batches, loss_fn, CONFIG, method=METHODS["emergence"], options=options)


def chain(layers, bias=False):
    torch.manual_seed(0)
    widths = [6, *[8] * (layers - 1), 5]
    modules = []
    for inputs, outputs in itertools.pairwise(widths):
        modules += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


@pytest.mark.parametrize(
    ("layers", "expected"), [(1, [0]), (2, [-1, 1]), (3, [-1, 0, 1]), (4, [-2, -1, 1, 2]), (5, [-2, -1, 0, 1, 2])]
)
def test_layers_are_numbered_from_the_middle_and_biases_left_alone(layers, expected):
    result = run(chain(layers, bias=True), batches_of("mlp", 1), zoo.vector_loss, alpha=1.5)
    weights, biases = list(result.scales.values())[::2], list(result.scales.values())[1::2]
    assert weights == pytest.approx([1.5**exponent for exponent in expected])
    assert biases == [1] * layers


@pytest.mark.parametrize("layers", [4, 5])
def test_a_chain_without_biases_computes_the_same(layers):
    model, inputs = chain(layers), zoo.vectors(8)[0]
    expected = model(inputs)
    run(model, batches_of("mlp", 1), zoo.vector_loss, alpha=2.0)
    torch.testing.assert_close(model(inputs), expected)
    assert model[0].weight.norm() < 0.51 * chain(layers)[0].weight.norm()


def test_the_block_of_a_transformer_is_a_layer():
    made = case("vit")
    result = run(made.model, batches_of("vit", 1), made.loss_fn, alpha=2.0)
    # Patch embedding, two blocks, classifier.
    for tensor in result.tensors:
        moved = tensor.kind in ("input", "trunk", "head")
        expected = {0: 1 / 4, 1: 1 / 2, 2: 2, 3: 4}[tensor.depth] if moved else 1
        assert tensor.omega == pytest.approx(expected), tensor.name
    assert sum(tensor.omega == pytest.approx(2) for tensor in result.tensors) == 6


class Flat(nn.Module):
    """Layers that are in no block."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


def test_without_blocks_each_weight_is_a_layer():
    result = run(Flat(), batches_of("mlp", 1), zoo.vector_loss, alpha=2.0)
    weights = [omega for name, omega in result.scales.items() if name.endswith("weight")]
    assert weights == pytest.approx([0.5, 1, 2])
