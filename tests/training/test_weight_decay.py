"""Parameter groups of the recipes against the published lists, family by family."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nio_hf.errors import ModelError
from nio_hf.recipe.loading import load_recipe
from nio_hf.tasks.image_classification import build_model
from nio_hf.training.weight_decay import decayed_parameters


def published_vit(layers: int) -> set[str]:
    """DeiT by timm: no decay of biases, normalisation, the class token and position embeddings."""
    names = {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings", "classifier.bias"}
    names |= {"vit.embeddings.patch_embeddings.projection.bias", "vit.layernorm.weight", "vit.layernorm.bias"}
    for layer in (f"vit.layers.{number}" for number in range(layers)):
        names |= {f"{layer}.attention.{part}_proj.bias" for part in "qkvo"}
        names |= {f"{layer}.mlp.fc1.bias", f"{layer}.mlp.fc2.bias"}
        names |= {f"{layer}.layernorm_{side}.{part}" for side in ("before", "after") for part in ("weight", "bias")}
    return names


def published_swin(depths: list[int]) -> set[str]:
    """Swin: no decay of biases, normalisation and tables of relative position biases."""
    norm = ("weight", "bias")
    names = {f"swin.layernorm.{part}" for part in norm} | {"classifier.bias"}
    names |= {f"swin.embeddings.norm.{part}" for part in norm} | {"swin.embeddings.patch_embeddings.projection.bias"}
    for stage, depth in enumerate(depths):
        for block in (f"swin.encoder.layers.{stage}.blocks.{number}" for number in range(depth)):
            names |= {f"{block}.attention.relative_position_bias.relative_position_bias_table"}
            names |= {f"{block}.attention.{part}_proj.bias" for part in "qkvo"}
            names |= {f"{block}.mlp.fc1.bias", f"{block}.mlp.fc2.bias"}
            names |= {f"{block}.layernorm_{side}.{part}" for side in ("before", "after") for part in norm}
        if stage < len(depths) - 1:
            names |= {f"swin.encoder.layers.{stage}.downsample.norm.{part}" for part in norm}
    return names


def without_decay(name: str) -> tuple[set[str], nn.Module]:
    recipe = load_recipe(name, ["--use_cpu", "true"])
    with torch.device("meta"):
        model = build_model(recipe.model, ("a", "b"))
    assert recipe.optimization.no_weight_decay is not None
    decayed = decayed_parameters(model, recipe.optimization.no_weight_decay)
    return {parameter for parameter, _ in model.named_parameters()} - set(decayed), model


@pytest.mark.parametrize("name", ["vit-tiny/imagenet-1k/nio", "vit-base/imagenet-1k/warmup", "vit-tiny/cifar10/nio"])
def test_vit_recipes_leave_out_what_deit_leaves_out(name: str) -> None:
    found, model = without_decay(name)
    assert found == published_vit(model.config.num_hidden_layers)


@pytest.mark.parametrize("name", ["swin-tiny/imagenet-1k/nio", "swin-base/imagenet-1k/warmup", "swin-tiny/cifar10/nio"])
def test_swin_recipes_leave_out_what_swin_leaves_out(name: str) -> None:
    found, model = without_decay(name)
    assert found == published_swin(model.config.depths)


@pytest.mark.parametrize("name", ["resnet-50/imagenet-1k/nio", "resnet-18/cifar10/warmup"])
def test_resnet_recipes_decay_the_weights_of_convolutions_and_the_head_only(name: str) -> None:
    found, model = without_decay(name)
    weights = {
        f"{module_name}.weight"
        for module_name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    assert found == {parameter for parameter, _ in model.named_parameters()} - weights
    assert len(weights) == {"resnet-50/imagenet-1k/nio": 54, "resnet-18/cifar10/warmup": 21}[name]


def test_a_name_that_no_parameter_has_is_an_error_with_the_nearest() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.raises(ModelError, match="Sequential has no parameter 'weigth'"):
        decayed_parameters(model, ["weigth"])
    assert decayed_parameters(model, []) == [name for name, _ in model.named_parameters()]
    assert decayed_parameters(model, ["vectors"]) == ["0.weight"]
