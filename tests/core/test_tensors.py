"""Which tensors are scaled, which form the gradient, and what is said of the others."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from nio_hf import NIOConfig, initialize
from nio_hf.core import LayerScales, register_gradient_module
from nio_hf.errors import ModelError
from tests import zoo
from tests.core.cases import FAMILIES, PER_TENSOR, batches_of, case

OWNERS = ("Linear", "Conv1D", "Conv2d", "LayerNorm", "ConvNextLayerNorm", "BatchNorm2d")
KINDS = {
    "Linear": "linear",
    "Conv1D": "linear",
    "Conv2d": "convolution",
    "LayerNorm": "norm",
    "ConvNextLayerNorm": "norm",
    "BatchNorm2d": "norm",
}
BLOCKS = {
    "vit": "ViTLayer",
    "deit": "DeiTLayer",
    "beit": "BeitLayer",
    "dinov2": "Dinov2Layer",
    "swin": "SwinLayer",
    "swinv2": "Swinv2Layer",
    "convnext": "ConvNextLayer",
    "gpt2": "GPT2Block",
    "bert": "BertLayer",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_are_chosen_by_what_they_are(name: str) -> None:
    model = case(name).model
    parameters = dict(model.named_parameters())
    owners = [(type(module).__name__, p) for module in model.modules() for p in module.parameters(recurse=False)]
    owned = {id(parameter) for owner, parameter in owners if owner in OWNERS}
    scales = LayerScales(model)
    assert [id(p) for p in scales.gradient] == [id(p) for p in parameters.values() if id(p) in owned]
    assert [id(p) for p in scales.scaled] == [id(p) for p in parameters.values() if p.any()]
    zeros = {parameter_name for parameter_name, parameter in parameters.items() if not parameter.any()}
    assert {(tensor.name, tensor.reason) for tensor in scales.excluded} == {(zero, "zero") for zero in zeros}
    assert zeros or name == "mlp"


@pytest.mark.parametrize("name", FAMILIES)
def test_kinds_name_the_layer_that_owns_a_tensor(name: str) -> None:
    model = case(name).model
    scales = LayerScales(model)
    kinds = {tensor.name: tensor.kind for tensor in scales.report(torch.ones(len(scales.scaled)))}
    kinds |= {tensor.name: tensor.kind for tensor in scales.excluded}
    assert sorted(kinds) == sorted(parameter for parameter, _ in model.named_parameters())
    for parameter, kind in kinds.items():
        module_name, _, role = parameter.rpartition(".")
        owner = type(model.get_submodule(module_name)).__name__
        group = KINDS.get(owner)
        expected = f"{group} {role}" if group else "embedding" if owner == "Embedding" else "parameter"
        assert kind == expected, parameter


@pytest.mark.parametrize("name", BLOCKS)
def test_depth_is_the_position_of_the_block(name: str) -> None:
    model = case(name).model
    modules = dict(model.named_modules())
    blocks = [module_name for module_name, module in modules.items() if type(module).__name__ == BLOCKS[name]]
    assert len(blocks) >= 2
    scales = LayerScales(model)
    depths = {tensor.name: tensor.depth for tensor in scales.report(torch.ones(len(scales.scaled)))}
    of_block = [{depths[t] for t in depths if t.startswith(f"{block}.")} for block in blocks]
    assert all(len(found) == 1 for found in of_block), of_block
    in_order = [found.pop() for found in of_block]
    assert in_order == sorted(set(in_order))
    first, last = (next(i for i, t in enumerate(depths) if t.startswith(f"{b}.")) for b in (blocks[0], blocks[-1]))
    values = list(depths.values())
    assert set(values[:first]) == {0}
    assert min(values[last:]) == in_order[-1] < values[-1]


@pytest.mark.parametrize("name", ["resnet", "mlp"])
def test_depth_grows_through_a_convolutional_or_plain_network(name: str) -> None:
    scales = LayerScales(case(name).model)
    depths = [tensor.depth for tensor in scales.report(torch.ones(len(scales.scaled)))]
    assert depths == sorted(depths)
    assert len(set(depths)) >= 4


def test_zero_tokens_are_left_out_with_the_reason() -> None:
    excluded = {tensor.name: tensor for tensor in LayerScales(case("deit").model).excluded}
    for token in ("cls_token", "distillation_token", "position_embeddings"):
        found = excluded[f"deit.embeddings.{token}"]
        assert (found.reason, found.kind) == ("zero", "parameter")


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_tied_tensors_are_scaled_once(name: str) -> None:
    made = case(name)
    embedding, head = made.model.get_input_embeddings().weight, made.model.get_output_embeddings().weight
    assert embedding is head
    scales = LayerScales(made.model)
    assert sum(parameter is embedding for parameter in scales.scaled) == 1
    assert sum(parameter is embedding for parameter in scales.gradient) == 1
    before = embedding.detach().clone()
    scales.apply([2 * parameter.detach() for parameter in scales.scaled])
    assert torch.equal(embedding, 2 * before)


def test_frozen_and_unused_tensors_are_reported_and_left_alone() -> None:
    made = case("dinov2")
    unused = nn.Linear(16, 16)
    made.model.dinov2.unused = unused
    frozen = made.model.dinov2.encoder.layer[0].mlp.fc1.weight.requires_grad_(False)
    with torch.no_grad():
        made.model.dinov2.embeddings.mask_token.fill_(0.1)
    before = [tensor.detach().clone() for tensor in (unused.weight, unused.bias, frozen)]
    result = initialize(
        made.model, batches_of("dinov2", 2), made.loss_fn, NIOConfig(**PER_TENSOR, iterations=1, holdout_batches=1)
    )
    reasons = {tensor.name: tensor.reason for tensor in result.excluded}
    assert reasons["dinov2.encoder.layer.0.mlp.fc1.weight"] == "frozen"
    for name in ("unused.weight", "unused.bias", "embeddings.mask_token"):
        assert reasons[f"dinov2.{name}"] == "unused"
    assert not reasons.keys() & result.scales.keys()
    assert reasons.keys() | result.scales.keys() == {name for name, _ in made.model.named_parameters()}
    assert all(torch.equal(a, b) for a, b in zip(before, (unused.weight, unused.bias, frozen), strict=True))


def test_layer_types_that_are_not_known_are_named_until_they_are_registered() -> None:
    from transformers.pytorch_utils import Conv1D

    model = zoo.text_model("gpt2")
    with pytest.raises(ModelError, match=r"unknown: Conv1D \(6,144\).*register_gradient_module"):
        LayerScales(model)
    register_gradient_module(Conv1D, "linear")
    scales = LayerScales(model)
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert any(parameter is weight for parameter in scales.gradient)


def test_subclasses_of_known_layers_are_known() -> None:
    class Own(nn.Linear):
        pass

    assert len(LayerScales(nn.Sequential(Own(3, 3))).gradient) == 2


def test_substituted_tensors_are_copies_until_the_originals_return() -> None:
    model = case("mlp").model
    scales = LayerScales(model)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    values = [parameter.detach().clone() for parameter in model.parameters()]
    with contextlib.suppress(KeyboardInterrupt), scales.substituted() as initial:
        for parameter in model.parameters():
            parameter.data.zero_()
        assert all(tensor.any() for tensor in initial)
        raise KeyboardInterrupt
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert all(torch.equal(a, b) for a, b in zip(values, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["meta", "half", "bfloat16", "frozen", "zero", "no layers"])
def test_models_that_cannot_be_initialised_are_refused(kind: str) -> None:
    model = case("vit").model
    message = {
        "meta": r"vit\.embeddings\.cls_token: on the meta device.*\n.* such tensors",
        "half": r"vit\.embeddings\.cls_token: dtype torch\.float16\. Load the model with dtype=torch\.float32",
        "bfloat16": r"dtype torch\.bfloat16",
        "frozen": r"ViTForImageClassification: no parameter requires a gradient. Unfreeze",
        "zero": r"ViTForImageClassification: no tensor can be scaled \(40 zero\)",
        "no layers": r"Embedding: no linear, convolution or normalisation layer is trainable",
    }[kind]
    match kind:
        case "meta":
            model = model.to("meta")
        case "half":
            model = model.half()
        case "bfloat16":
            model = model.bfloat16()
        case "frozen":
            model.requires_grad_(False)
        case "zero":
            torch._foreach_zero_([parameter.data for parameter in model.parameters()])
        case "no layers":
            model = nn.Embedding(3, 2)
    with pytest.raises(ModelError, match=message):
        LayerScales(model)


def test_frozen_tensors_may_be_in_half_precision() -> None:
    model = case("mlp").model
    model[0].requires_grad_(False).half()
    assert len(LayerScales(model).gradient) == 6
