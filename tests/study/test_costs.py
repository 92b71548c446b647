"""The cost of an initialisation."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification, ViTConfig

from nio_hf.errors import ConfigError
from nio_hf.metrics import ACCURACY, IMAGE_CLASSIFICATION, LOSS, METRICS
from nio_hf.recipe.loading import load_recipe
from nio_hf.study.costs import OperationCount, most_steps
from nio_hf.study.plan import QUIET
from nio_hf.study.worker import train_once


def _gradient_of_gradient(model):
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    loss = model(images, labels=torch.tensor([0, 1, 1])).loss
    weights = [weight for weight in model.parameters() if weight.dim() > 1]
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    torch.stack([gradient.pow(2).sum() for gradient in gradients]).sum().backward()


def test_operations_are_counted_as_torch_counts_them():
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = ViTConfig(image_size=16, patch_size=4, num_labels=2, attn_implementation="eager", **sizes)
    model = AutoModelForImageClassification.from_config(config)
    with FlopCounterMode(display=False) as expected:
        _gradient_of_gradient(model)
    with OperationCount() as counted:
        _gradient_of_gradient(model)
    assert counted.operations == expected.get_total_flops() > 0


def _train(folder, share=1.0, **settings):
    small = {"model_config.num_hidden_layers": 1, "max_eval_samples": 50}
    recipe = load_recipe("vit-tiny/digits/nio").replace({**QUIET, **small, "output_dir": str(folder), **settings})
    return train_once(recipe, cost_share=share)


@pytest.mark.parametrize(("method", "pays"), [("range", False), ("architecture_aware", True), ("nio", True)])
def test_a_method_that_looks_at_no_data_is_not_paid_for(method, pays, tmp_path):
    outcome = _train(tmp_path, nio_method=method, max_steps=14)
    assert (outcome.cost_steps > 0) == pays
    assert outcome.steps == len(outcome.losses) == 14 - math.ceil(outcome.cost_steps)


def test_a_probe_pays_its_share_of_what_an_initialisation_costs(tmp_path):
    outcome = _train(tmp_path, 0.25, max_steps=6)
    assert outcome.cost_steps > 6
    assert outcome.steps == 6 - math.ceil(outcome.cost_steps / 4)
    groups = outcome.initialisation["scales_by_group"]
    assert set(groups.values()) == set(outcome.initialisation["scales"])
    failed = _train(tmp_path, 0.9, max_steps=6)
    assert (failed.value, failed.steps) == (None, 0)
    assert "training steps, the budget is 6" in str(failed.error)
    with pytest.raises(ConfigError, match=r"--steps: the initialisation costs \d+ training steps, the budget is 6"):
        _train(tmp_path, max_steps=6)


def test_the_steps_of_a_race_are_paid_for(tmp_path):
    raced = {"nio_method": "range", "nio_method_kwargs": {"factor": 2.0}, "nio_race_steps": 4}
    outcome = _train(tmp_path, **raced, max_steps=20)
    assert outcome.cost_steps in (6, 8)
    assert outcome.steps == 20 - outcome.cost_steps
    recipe = load_recipe("vit-tiny/digits/nio")
    assert most_steps(recipe.replace(raced).training) == 8
    assert most_steps(recipe.replace({"nio_race_steps": 4}).training) == 8 + (most_steps(recipe.training) or 0)


def test_the_value_of_a_run_is_that_of_its_metric(tmp_path, monkeypatch):
    by_metric = {}
    for metric in (ACCURACY, LOSS):
        monkeypatch.setitem(METRICS, IMAGE_CLASSIFICATION, metric)
        by_metric[metric] = _train(tmp_path, nio=False, max_steps=2)
    assert by_metric[LOSS].value == by_metric[LOSS].eval_loss == by_metric[ACCURACY].eval_loss
    percent = by_metric[ACCURACY].value
    assert 2 <= percent <= 100
    assert percent / 2 == pytest.approx(round(percent / 2)), "a share of 50 images, in percent"
