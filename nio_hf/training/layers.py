"""The layer types of transformers that belong to the gradient tensors."""

from __future__ import annotations

from transformers.pytorch_utils import Conv1D

from nio_hf.core.tensors import register_gradient_module


def register_transformers_layers() -> None:
    """Register the linear layer of GPT-2. Normalisation layers of their own are known by their suffix."""
    register_gradient_module(Conv1D, "linear")
