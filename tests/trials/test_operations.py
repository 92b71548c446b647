"""Counting floating point operations."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification, ViTConfig

from nio_hf.trials.operations import OperationCount


def _gradient_of_gradient(model: nn.Module) -> None:
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    loss = model(images, labels=torch.tensor([0, 1, 1])).loss
    weights = [weight for weight in model.parameters() if weight.dim() > 1]
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    torch.stack([gradient.pow(2).sum() for gradient in gradients]).sum().backward()


def test_operations_are_counted_as_torch_counts_them() -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = ViTConfig(image_size=16, patch_size=4, num_labels=2, attn_implementation="eager", **sizes)
    model = AutoModelForImageClassification.from_config(config)
    with FlopCounterMode(display=False) as expected:
        _gradient_of_gradient(model)
    with OperationCount() as counted:
        _gradient_of_gradient(model)
    assert counted.operations == expected.get_total_flops() > 0


def test_a_product_of_matrices_takes_two_operations_for_each_pair() -> None:
    with OperationCount() as counted:
        torch.ones(3, 4) @ torch.ones(4, 5)
        torch.ones(7).exp()
    assert counted.operations == 2 * 3 * 4 * 5
