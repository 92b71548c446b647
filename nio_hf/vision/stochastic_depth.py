"""Stochastic depth for models whose configuration has none."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.deit.modeling_deit import DeiTLayer
from transformers.models.vit.modeling_vit import ViTLayer

from nio_hf.errors import ModelError, Problem

CONFIG_FIELD = "drop_path_rate"


class StochasticDepth(nn.Module):
    """Drops a residual branch for some of the samples while training (arXiv 1603.09382).

    The branch of a sample is 0 with probability p, and otherwise divided by 1 - p, so that its mean stays the same.

    Args:
        p: probability, in [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """The branch (B, ...) of each sample, kept or dropped."""
        if not self.training or self.p == 0:
            return branch
        kept = torch.empty(len(branch), *[1] * (branch.ndim - 1), dtype=branch.dtype, device=branch.device)
        return branch * kept.bernoulli_(1 - self.p) / (1 - self.p)

    def extra_repr(self) -> str:
        """The probability."""
        return f"p={self.p:g}"


def add_stochastic_depth(model: PreTrainedModel, rate: float) -> None:
    """Put stochastic depth behind both residual branches of each layer of a ViT or DeiT.

    The probability rises linearly with depth from 0 at the first layer to `rate` at the last, as published.

    Raises:
        ModelError: for another model: those with `drop_path_rate` in their configuration do it themselves.
    """
    layers = [module for module in model.modules() if isinstance(module, ViTLayer | DeiTLayer)]
    if not layers:
        found = f"{type(model).__name__} has no layers of a ViT or DeiT to put it behind"
        raise ModelError(Problem(CONFIG_FIELD, found, "Leave it out, or choose an architecture that has it"))
    for depth, layer in enumerate(layers):
        probability = rate * depth / max(len(layers) - 1, 1)
        branch_end = nn.Sequential(layer.dropout, StochasticDepth(probability))
        layer.add_module("dropout", branch_end.train(layer.training))
