"""The weights of layers, their fan-in, and the common factor that keeps variances."""

import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification, set_seed
from transformers.pytorch_utils import Conv1D

from nio_hf import initialize
from nio_hf.core import NIOConfig, find_tensors
from nio_hf.core.layers import drawn_larger, fan_in, layer_weights, preserving_factor
from nio_hf.errors import ModelError
from tests.core.cases import case


def factor_of(model):
    return preserving_factor(model, find_tensors(model, "weights", "model"))


def drawn(layer, std):
    nn.init.normal_(layer.weight, std=std, generator=torch.Generator().manual_seed(0))
    return layer


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.Linear(6, 4), 6),
        (nn.Linear(6, 4, bias=False), 6),
        (nn.Conv1d(6, 4, 5), 30),
        (nn.Conv2d(6, 4, (3, 2)), 36),
        (nn.Conv2d(6, 4, 3, groups=2), 27),
        (nn.ConvTranspose2d(6, 4, 3, groups=2), 27),
        (nn.Bilinear(6, 3, 4), 18),
        (Conv1D(4, 6), 6),
    ],
)
def test_fan_in(layer, inputs):
    ((place, owners),) = layer_weights(layer, find_tensors(layer)).items()
    assert fan_in(place.parameter, owners[0]) == inputs


def test_of_a_stack_of_matrices_both_dimensions_count():
    experts = nn.ParameterDict({"weight": torch.randn(3, 20, 5)})
    assert fan_in(experts.weight, experts) == pytest.approx(10)


def test_a_factor_makes_the_variance_one_over_fan_in():
    torch.manual_seed(0)
    layer = nn.Linear(400, 300)
    before = torch.randn(500, 400)
    factor = factor_of(layer)
    with torch.no_grad():
        layer.weight.mul_(factor)
        layer.bias.zero_()
        after = layer(before)
    assert float(after.var()) == pytest.approx(float(before.var()), rel=0.03)
    assert factor_of(layer) == pytest.approx(1.0)


def test_one_factor_for_several_layers_is_their_mean_over_the_entries():
    model = nn.Sequential(drawn(nn.Linear(64, 16), 0.02), nn.Tanh(), drawn(nn.Linear(16, 4), 0.5))
    wanted = [math.log(1 / (0.02 * 8)), math.log(1 / (0.5 * 4))]
    mean = (wanted[0] * 64 * 16 + wanted[1] * 16 * 4) / (64 * 16 + 16 * 4)
    assert factor_of(model) == pytest.approx(math.exp(mean), rel=0.05)
    last = find_tensors(model, groups={"last": "^2.weight"})
    assert preserving_factor(model, last) == pytest.approx(0.5, rel=0.1), "scaled tensors alone count"


@pytest.mark.parametrize("name", ["vit", "swin", "gpt2", "bert", "resnet", "mlp"])
def test_what_is_no_layer_does_not_count(name):
    model = case(name).model
    before = factor_of(model)
    tied = model.get_output_embeddings() if name in ("gpt2", "bert") else None
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim < 2 or "position" in key or "wpe" in key or "token" in key:
                parameter.mul_(7.0)
        if tied is not None:
            tied.weight.mul_(7.0)
    assert factor_of(model) == pytest.approx(before, rel=1e-6)


def test_a_layer_of_one_bias_and_one_that_is_all_but_zero_are_no_obstacles():
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data = 0.25 * torch.eye(4)
    plain = factor_of(layer)
    layer.bias = nn.Parameter(torch.tensor(1.0))
    assert factor_of(layer) == plain
    tiny = nn.Linear(4, 4, bias=False)
    tiny.weight.data.fill_(1e-24)
    assert 1 < factor_of(nn.Sequential(tiny, layer)) < plain


def test_a_model_without_a_layer_has_the_factor_one():
    model = nn.Sequential(nn.Embedding(5, 4))
    assert factor_of(model) == 1.0
    with pytest.raises(ModelError, match="no layer has a weight to initialise"):
        layer_weights(model, find_tensors(model))


def test_layers_that_a_class_draws_smaller_on_purpose_count_as_if_they_were_not():
    """GPT-2 divides what leads into the residual stream by sqrt(2 layers); BERT does not."""
    set_seed(0)
    sizes = {"n_embd": 64, "n_head": 4, "n_positions": 8, "vocab_size": 10}
    scaled, plain = (GPT2LMHeadModel(GPT2Config(n_layer=8, **sizes)) for _ in range(2))
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if name.endswith("c_proj.weight"):
                weight.mul_(4.0)
    fan_ins = [*[64] * 8, *[256] * 4]
    expected = math.prod((0.02 * math.sqrt(inputs)) ** (-1 / len(fan_ins)) for inputs in fan_ins)
    assert factor_of(plain) == pytest.approx(expected, rel=0.01)
    assert factor_of(scaled) == pytest.approx(expected, rel=0.01)
    with torch.no_grad():
        for weight in scaled.parameters():
            weight.mul_(3.0)
    # Where the class's range is gone, each layer counts as it is.
    assert factor_of(scaled) == pytest.approx(expected / 3 * 4 ** (5 / 12), rel=0.02)


def small_vit():
    set_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 2, "num_hidden_layers": 2}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))


def test_what_another_initialisation_has_made_larger_is_left_alone():
    """Queries and keys that are multiplied further would let a token attend to itself alone."""
    model = small_vit()
    attention = [name for name, _ in model.named_parameters() if name.endswith(("q_proj.weight", "k_proj.weight"))]
    with torch.no_grad():
        for name in attention:
            model.get_parameter(name).mul_(6.0)
    before = {name: model.get_parameter(name).clone() for name in attention}
    batch = {"pixel_values": torch.randn(16, 3, 8, 8), "labels": torch.arange(16) % 3}
    result = initialize(model, [batch] * 4, lambda model, batch: model(**batch).loss)
    assert {tensor.name for tensor in result.excluded if tensor.reason == "larger"} == set(attention)
    assert all(torch.equal(model.get_parameter(name), values) for name, values in before.items())
    assert result.scales["classifier.weight"] > 2
    named = NIOConfig(groups={"all": "weight"})
    asked = initialize(model, [batch] * 4, lambda model, batch: model(**batch).loss, named)
    assert set(attention) <= asked.scales.keys(), "a group that the user names is scaled"


def test_additive_tensors_are_left_alone_together():
    model = small_vit()
    tensors = find_tensors(model, "weights", "additive")
    assert drawn_larger(model, tensors) == []
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.mul_(10.0)
    larger = set(drawn_larger(model, tensors))
    assert larger == {place.name for place in tensors.scaled if place.kind == "additive"}
    assert len(larger) > 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    assert drawn_larger(model, tensors) == [], "most layers have not the range of the class"
