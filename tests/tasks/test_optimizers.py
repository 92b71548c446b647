"""Muon and AdamW as one optimiser, and weight decay against the published lists, family by family."""

import math

import pytest
import torch
from torch import nn

from nio_hf import NIOTrainingArguments
from nio_hf.errors import ModelError
from nio_hf.recipe.loading import load_recipe
from nio_hf.tasks.image_classification import build_model
from nio_hf.tasks.optimizers import MuonAndAdamW, decayed_parameters, optimizer_options
from tests.trainer.toys import build

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6}


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 4), (4, 6), (5, 3), (4,))]


def made(params):
    groups = [{"params": params[:3], "weight_decay": 0.1}, {"params": params[3:], "weight_decay": 0.0}]
    return MuonAndAdamW(groups, matrices=params[:2], **SETTINGS)


def take_steps(optimizer, params, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in params:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for one in optimizer if isinstance(optimizer, list) else [optimizer]:
            one.step()


def test_each_parameter_is_updated_by_its_own_optimizer():
    params, expected = parameters(), parameters()
    take_steps(made(params), params, range(3))
    muon = torch.optim.Muon(expected[:2], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    decayed = torch.optim.AdamW(expected[2:3], weight_decay=0.1, **SETTINGS)
    plain = torch.optim.AdamW(expected[3:], weight_decay=0.0, **SETTINGS)
    take_steps([muon, decayed, plain], expected, range(3))
    assert all(torch.equal(a, b) for a, b in zip(params, expected, strict=True))


def test_the_first_update_of_muon_has_the_size_of_adams():
    params = parameters()
    before = params[0].detach().clone()
    groups = [{"params": params, "weight_decay": 0.0}]
    take_steps(MuonAndAdamW(groups, matrices=params[:2], **SETTINGS), params, range(1))
    update = (params[0].detach() - before) / 0.01
    # Singular values near 1 times 0.2 sqrt(max(out, in)): a root mean square of about 0.2, as Adam's in practice.
    assert update.square().mean().sqrt().item() == pytest.approx(0.2 * math.sqrt(6 * 4 / 24), rel=0.25)


def test_a_schedule_reaches_both():
    params = parameters()
    optimizer = made(params)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    take_steps(optimizer, params, range(1))
    schedule.step()
    before = [parameter.detach().clone() for parameter in params]
    take_steps(optimizer, params, range(1, 2))
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_a_state_goes_on_where_it_was_saved(tmp_path):
    whole, first = parameters(), parameters()
    take_steps(made(whole), whole, range(4))
    optimizer = made(first)
    take_steps(optimizer, first, range(2))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    second = [nn.Parameter(parameter.detach().clone()) for parameter in first]
    again = made(second)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    take_steps(again, second, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))
    assert len(again.param_groups) == 3


def test_the_matrices_of_blocks_are_for_muon_and_no_others(tmp_path):
    model, arguments = build("vit"), NIOTrainingArguments(output_dir=str(tmp_path))
    chosen = optimizer_options("muon", arguments, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)] for parameter in chosen[1]["matrices"]}
    assert all(".layers." in name or ".layer." in name for name in found)
    assert not [name for name in found if "embeddings" in name or "classifier" in name or "norm" in name]
    assert len(found) == sum(parameter.ndim == 2 for name, parameter in model.named_parameters() if name in found) > 4
    with pytest.raises(ModelError, match="muon, and Sequential has no matrices in its blocks"):
        optimizer_options("muon", arguments, nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))


@pytest.mark.parametrize(
    ("name", "count"),
    {
        **{"vit-tiny/imagenet-1k/nio": 12 * 6 + 2, "vit-tiny/cifar10/nio": 12 * 6 + 2},
        **{"swin-tiny/imagenet-1k/nio": 12 * 6 + 3 + 2, "swin-base/imagenet-1k/nio": 24 * 6 + 3 + 2},
        **{"resnet-50/imagenet-1k/nio": 54, "resnet-18/cifar10/warmup": 21},
    }.items(),
)
def test_recipes_decay_the_weights_of_linear_and_convolution_layers_alone(name, count):
    """As DeiT by timm and Swin: no biases, normalisation, class token, positions, or tables of relative positions."""
    recipe = load_recipe(name, ["--use_cpu", "true"])
    with torch.device("meta"):
        model = build_model(recipe.model, ("a", "b"))
    layers = [key for key, part in model.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    found = decayed_parameters(model, recipe.optimization.no_weight_decay or [])
    assert sorted(found) == sorted(f"{key}.weight" for key in layers)
    assert len(found) == count


def test_a_name_that_no_parameter_has_is_an_error_with_the_nearest():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.raises(ModelError, match=r"Sequential has no parameter 'weigth'\. Did you mean 'weight'\?"):
        decayed_parameters(model, ["weigth"])
    assert decayed_parameters(model, []) == [name for name, _ in model.named_parameters()]
    assert decayed_parameters(model, ["vectors"]) == ["0.weight"]
