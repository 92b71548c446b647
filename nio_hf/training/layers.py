"""The layer types of transformers that belong to the gradient tensors."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from nio_hf.core.scales import register_gradient_module


def register_transformers_layers(model: nn.Module) -> None:
    """Register GPT-2's Conv1D and the normalisation layers that the models of transformers define for themselves."""
    register_gradient_module(Conv1D, "linear")
    for module_type in {type(module) for module in model.modules()}:
        own_norm = module_type.__name__.endswith(("RMSNorm", "LayerNorm"))
        if own_norm and module_type.__module__.startswith("transformers."):
            register_gradient_module(module_type, "norm")
