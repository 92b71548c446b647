"""Sums that layers lead to, in hand-made graphs and in the models of transformers."""

import pytest
import torch
from torch import nn

from nio_hf.baselines.in_degree import in_degrees
from nio_hf.core.layers import layer_weights
from nio_hf.core.mode import measuring
from nio_hf.core.tensors import find_tensors
from tests import zoo
from tests.core.cases import case
from tests.versions import BRANCH_ENDS

ENDS = {
    **dict.fromkeys(("vit", "swin", "beit", "dinov2", "bert"), BRANCH_ENDS),
    "gpt2": ("c_proj.weight",),
    "convnext": ("pwconv2.weight",),
    "resnet": ("layer.1.convolution.weight", "shortcut.convolution.weight"),
    "mlp": (),
}


@pytest.mark.parametrize("name", ENDS)
def test_layers_at_the_end_of_a_branch_have_two(name):
    made = case(name)
    weights = layer_weights(made.model, find_tensors(made.model))
    with measuring(made.model):
        loss = made.loss_fn(made.model, made.batch)
        found = in_degrees(loss[0] if isinstance(loss, tuple) else loss, [place.parameter for place in weights])
    expected = {place.name: 2 if place.name.endswith(ENDS[name]) else 1 for place in weights}
    assert dict(zip(expected, found, strict=True)) == expected
    assert name == "mlp" or 2 in found


class Graph(nn.Module):
    """Linear layers a to f of one width."""

    def __init__(self, bias):
        super().__init__()
        for name in "abcdef":
            self.add_module(name, nn.Linear(4, 4, bias=bias))
        self.scale = nn.Parameter(torch.ones(4))
        self.position = nn.Parameter(torch.ones(4))
        self.norm = nn.LayerNorm(4)

    def degrees(self, value):
        weights = [self.get_parameter(f"{name}.weight") for name in "abcdef"]
        return "".join(map(str, in_degrees(value.sum(), weights)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_hand_made_graphs(shape, bias):
    m, x = Graph(bias), torch.randn(shape)
    a, b, c, d, e = (m.get_submodule(name) for name in "abcde")
    chain = c(torch.relu(b(a(x))))
    assert m.degrees(chain) == "111111"
    assert m.degrees(a(x) + m.position) == "111111", "a parameter is no activation"
    stem = a(x)
    assert m.degrees(stem + b(stem)) == "121111", "the skip connection is not the output of a"
    assert m.degrees(stem + m.scale * torch.tanh(m.norm(b(stem)))) == "121111", "what works on b alone is passed"
    assert m.degrees(stem + a(stem)) == "211111", "a weight that is used twice has the larger one"
    assert m.degrees(c(stem) + b(stem)) == "122111", "a shortcut with a weight"
    assert m.degrees(stem + b(stem) + c(stem)) == "133111", "three summands in one vertex"
    once = stem + b(stem)
    assert m.degrees(once + c(once)) == "122111", "two vertices, one after the other"
    assert m.degrees(d(a(x) + b(x)) + e(stem)) == "221221"
    assert m.degrees(a(x) @ b(x).transpose(-1, -2)) == "111111", "a product is no sum"


def test_the_branch_of_an_embedding_is_a_skip_connection():
    embedding, layer = nn.Embedding(9, 4), nn.Linear(4, 4)
    tokens = embedding(torch.arange(3))
    assert in_degrees((tokens + layer(tokens)).sum(), [layer.weight]) == [2]


def test_deep_graphs_need_no_recursion():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    for _ in range(3000):
        x = torch.tanh(layer(x))
    assert in_degrees(x.sum(), [layer.weight]) == [1]


def test_attention_of_torch():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    stem = nn.Linear(6, 8)
    weights = {n: p for n, p in layer.named_parameters() if p.ndim > 1}
    found = in_degrees(layer(stem(zoo.vectors(4)[0][None])).sum(), list(weights.values()))
    expected = {"self_attn.in_proj_weight": 1, "self_attn.out_proj.weight": 2, "linear1.weight": 1, "linear2.weight": 2}
    assert dict(zip(weights, found, strict=True)) == expected
