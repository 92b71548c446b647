"""The fp32 copy of a model that NIO works on, and the way of the scales back to the model."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from nio_hf.core.collective import Collective
from nio_hf.core.scales import check_storage

_DIFFERENTIABLE_ATTENTION = ("eager", "sdpa")


def make_replica(model: nn.Module, device: torch.device, collective: Collective) -> nn.Module:
    """A copy of a model on a device, the same on every process.

    Args:
        model: unwrapped; it is not changed.
        device: where NIO computes.
        collective: its rank 0 gives the weights.

    Raises:
        ModelError: for parameters without data, sharded ones, and half precision.
    """
    check_storage(model)
    replica = copy.deepcopy(model).to(device)
    if hasattr(replica, "_original_forward"):
        # Accelerate patches `forward` on the instance, bound to the model that was copied.
        replica.__dict__.pop("forward", None)
    if isinstance(replica, PreTrainedModel) and replica.config._attn_implementation not in _DIFFERENTIABLE_ATTENTION:
        replica.set_attn_implementation("eager")
    for tensor in (*replica.parameters(), *replica.buffers()):
        collective.broadcast_(tensor.data)
    return replica


@torch.no_grad()
def copy_parameters(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters into a model of the same class, in place and at once: optimizers keep their references."""
    values = dict(source.named_parameters())
    names, tensors = zip(*target.named_parameters(), strict=True)
    torch._foreach_copy_([tensor.data for tensor in tensors], [values[name].data for name in names])


@torch.no_grad()
def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Copy buffers into a model of the same class, in place."""
    values = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        buffer.copy_(values[name])
