"""Names that other releases of transformers call differently."""

import pytest
import transformers
from packaging.version import Version
from transformers import PreTrainedModel

_HAS_NEW_NAME = hasattr(PreTrainedModel, "activation_checkpointing_enable")
CHECKPOINTING = "activation_checkpointing" if _HAS_NEW_NAME else "gradient_checkpointing"
"""Of the training arguments, and of methods of a model."""
QUERIES, VALUES = r"(q_proj|query)", r"(v_proj|value)"
"""Regular expressions of the projections of a ViT."""
BRANCH_ENDS = ("o_proj.weight", "fc2.weight", "output.dense.weight")
"""Ends of the names of the projections into the residual stream."""

resumes_in_several_processes = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="Trainer resumes several processes on the CPU from transformers 5.18 on",
)


def checkpoint_activations(model):
    """Let a model compute activations again instead of keeping them."""
    getattr(model, f"{CHECKPOINTING}_enable")()


def checkpoints_activations(model):
    return getattr(model, f"is_{CHECKPOINTING}")
