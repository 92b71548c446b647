"""Stochastic depth: branches dropped by sample, their mean kept, and the model otherwise as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    DeiTForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinForImageClassification,
    ViTForImageClassification,
)
from transformers.models.deit.modeling_deit import DeiTLayer
from transformers.models.vit.modeling_vit import ViTLayer

from nio_hf.errors import ModelError
from nio_hf.vision.stochastic_depth import StochasticDepth, add_stochastic_depth

LAYERS = 5


CLASSES: dict[str, type[PreTrainedModel]] = {"vit": ViTForImageClassification, "deit": DeiTForImageClassification}


def transformer(model_type: str, layers: int = LAYERS, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type,
        image_size=8,
        patch_size=4,
        hidden_size=8,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=16,
        **changes,
    )
    return CLASSES[model_type](config)


def layers_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, ViTLayer | DeiTLayer)]


def rates_of(model: PreTrainedModel) -> list[float]:
    return [module.p for module in model.modules() if isinstance(module, StochasticDepth)]


def images(size: int = 4) -> torch.Tensor:
    return torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model_type", CLASSES)
def test_outputs_of_evaluation_and_the_state_dict_stay_as_they_were(model_type: str) -> None:
    model = transformer(model_type).eval()
    before, keys = model(images()).logits, list(model.state_dict())
    add_stochastic_depth(model.train(), 0.5)
    assert torch.equal(model.eval()(images()).logits, before)
    assert list(model.state_dict()) == keys
    model.load_state_dict(transformer(model_type).state_dict())


@pytest.mark.parametrize("model_type", CLASSES)
@pytest.mark.parametrize("training", [True, False])
def test_it_drops_in_training_only_from_the_mode_on_that_the_model_has(model_type: str, training: bool) -> None:
    model = transformer(model_type).train(training)
    add_stochastic_depth(model, 0.5)
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("model_type", CLASSES)
def test_a_saved_model_is_read_without_it(model_type: str, tmp_path: Path) -> None:
    model = transformer(model_type)
    add_stochastic_depth(model, 0.5)
    model.eval().save_pretrained(tmp_path)
    found = CLASSES[model_type].from_pretrained(tmp_path)
    torch.testing.assert_close(found(images()).logits, model(images()).logits)


@pytest.mark.parametrize("model_type", CLASSES)
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_rates_rise_linearly_from_zero_to_the_last_layer(model_type: str, layers: int) -> None:
    model = transformer(model_type, layers)
    add_stochastic_depth(model, 0.4)
    wanted = [0.4 * depth / max(layers - 1, 1) for depth in range(layers)]
    assert rates_of(model) == pytest.approx(wanted)


@pytest.mark.parametrize("model_type", CLASSES)
def test_both_branches_of_a_layer_are_dropped_for_a_sample_each_by_its_own_draw(model_type: str) -> None:
    torch.manual_seed(2)
    model = transformer(model_type).train()
    add_stochastic_depth(model, 0.5)
    layer, size = layers_of(model)[-1], 2000
    hidden = torch.randn(1, 5, 8).expand(size, -1, -1)
    with torch.no_grad():
        model.eval()
        middle = []
        layer.layernorm_after.register_forward_pre_hook(lambda module, inputs: middle.append(inputs[0]))
        layer(hidden)
        model.train()
        after = layer(hidden)
    first = (middle[1] == hidden).flatten(1).all(1)
    second = (after == middle[1]).flatten(1).all(1)
    for dropped in (first, second):
        assert abs(dropped.float().mean() - 0.5) < 0.05
    assert abs((first & second).float().mean() - 0.25) < 0.04
    kept = (middle[1] - hidden)[~first]
    torch.testing.assert_close(kept, (2 * (middle[0] - hidden))[~first], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_branch_is_dropped_with_its_probability_and_keeps_its_mean(p: float) -> None:
    torch.manual_seed(3)
    drop = StochasticDepth(p).train()
    branch = torch.randn(1, 3, 4).expand(20_000, -1, -1)
    found = drop(branch)
    dropped = (found == 0).flatten(1).all(1)
    assert abs(dropped.float().mean() - p) < 0.012
    torch.testing.assert_close(found[~dropped], branch[~dropped] / (1 - p))
    torch.testing.assert_close(found.mean(0), branch[0], atol=0.1, rtol=0.1)


def test_nothing_is_dropped_or_drawn_in_evaluation_or_without_a_rate() -> None:
    branch = torch.randn(4, 3)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    assert torch.equal(StochasticDepth(0.5).eval()(branch), branch)
    assert torch.equal(StochasticDepth(0.0).train()(branch), branch)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_dropped_branch_has_no_gradient_and_the_branch_given_stays_as_it_was() -> None:
    torch.manual_seed(5)
    branch = torch.ones(50, 3, requires_grad=True)
    StochasticDepth(0.5).train()(branch).sum().backward()
    assert set(branch.grad.flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(branch.detach(), torch.ones(50, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_precision_of_a_branch_is_kept(dtype: torch.dtype) -> None:
    found = StochasticDepth(0.25).train()(torch.ones(10, 2, dtype=dtype))
    assert found.dtype == dtype


def test_dropout_of_the_configuration_stays() -> None:
    model = transformer("vit", hidden_dropout_prob=0.3)
    add_stochastic_depth(model, 0.1)
    for layer in layers_of(model):
        assert [module.p for module in layer.dropout] == [0.3, pytest.approx(layer.dropout[1].p)]
        assert isinstance(layer.dropout[0], torch.nn.Dropout)


def test_a_model_in_training_gives_other_outputs_from_draw_to_draw_and_the_same_from_one_seed() -> None:
    model = transformer("vit").train()
    add_stochastic_depth(model, 0.5)

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        logits: torch.Tensor = model(images(16)).logits
        return logits

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))


def test_a_copy_of_the_model_drops_likewise() -> None:
    model = transformer("deit")
    add_stochastic_depth(model, 0.2)
    assert rates_of(copy.deepcopy(model)) == rates_of(model)
    assert "p=0.2" in repr(model)


def test_swin_does_it_itself_and_is_refused() -> None:
    config = AutoConfig.for_model("swin", image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2])
    config.window_size = 4
    model = SwinForImageClassification(config)
    before = repr(model)
    with pytest.raises(ModelError) as raised:
        add_stochastic_depth(model, 0.1)
    assert str(raised.value).startswith("drop_path_rate: SwinForImageClassification ")
    assert repr(model) == before


def test_an_architecture_without_stochastic_depth_is_refused() -> None:
    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    )
    with pytest.raises(ModelError) as raised:
        add_stochastic_depth(model, 0.1)
    assert str(raised.value) == (
        "drop_path_rate: ResNetForImageClassification has no layers of a ViT or DeiT to put it behind. "
        "Leave it out, or choose an architecture that has it."
    )
