"""The fp32 copy of a model that NIO works on, and the way of its weights back to the model."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nio_hf.core import Collective
from nio_hf.core.memory import available_memory
from nio_hf.core.tensors import check_storage
from nio_hf.errors import ModelError, NIOMemoryError, Problem

COPIES = 4
"""Vectors of the size of the model that NIO holds at least: theta, W, one gradient and the sum u."""
_DIFFERENTIABLE_ATTENTION = ("eager", "sdpa")
_GIB = 2**30


def make_replica(model: nn.Module, device: torch.device, collective: Collective) -> nn.Module:
    """A copy of a model on a device, whole and the same on every process.

    Args:
        model: Unwrapped; it is not changed.
        device: Device that NIO computes on.
        collective: Processes; rank 0 gives the weights.

    Raises:
        ModelError: Parameters without data, sharded at load or in half precision, and for adapters.
        NIOMemoryError: Where NIO cannot fit into the memory of the device.
    """
    with collective.together():
        _check_no_adapters(model)
        check_memory(model, device)
        if not _is_partitioned(model):
            check_storage(model)
    with collective.together():
        with gathered(model):
            replica = copy.deepcopy(model)
        # DeepSpeed rounds what it partitions to the precision of the training.
        replica = replica.float().to(device) if _is_partitioned(model) else replica.to(device)
        unpatch_forward(replica)
        if (
            isinstance(replica, PreTrainedModel)
            and replica.config._attn_implementation not in _DIFFERENTIABLE_ATTENTION
        ):
            replica.set_attn_implementation("eager")
    broadcast(replica, collective)
    return replica


def unpatch_forward(model: nn.Module) -> Any:
    """Take away the `forward` that accelerate patches into the instance, also into a copy, and return it."""
    return model.__dict__.pop("forward", None) if hasattr(model, "_original_forward") else None


@contextlib.contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Let a model compute by its own `forward`, without the precision of the training, which accelerate patches in."""
    patched = unpatch_forward(model)
    try:
        yield
    finally:
        if patched is not None:
            model.__dict__["forward"] = patched


def copied_to_cpu(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters of a model, by name."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}


def broadcast(replica: nn.Module, collective: Collective) -> None:
    """Give all processes the parameters and buffers of rank 0; it follows on a block of `together`."""
    for tensor in (*replica.parameters(), *replica.buffers()):
        collective.broadcast_(tensor.data)


@torch.no_grad()
def take_over(replica: nn.Module, model: nn.Module, collective: Collective) -> None:
    """Copy the weights of a replica into its model, in place: optimizers keep their references.

    With several processes buffers are copied, too, since those of the model may have been others on each.
    """
    values = dict(replica.named_parameters())
    if _is_partitioned(model):
        _copy_partitioned(values, model)
    else:
        names, tensors = zip(*model.named_parameters(), strict=True)
        torch._foreach_copy_([tensor.data for tensor in tensors], [values[name].data for name in names])
    if collective.size > 1:
        buffers = dict(replica.named_buffers())
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def replica_bytes(model: nn.Module) -> int:
    """Bytes of a copy of the model, of which ZeRO-3 may have spread the original over the processes."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(getattr(tensor, "ds_numel", tensor.numel()) * max(tensor.element_size(), 4) for tensor in tensors)


def check_memory(model: nn.Module, device: torch.device) -> None:
    """Refuse a model that NIO cannot fit beside into the memory of a device, activations not counted.

    Raises:
        NIOMemoryError: With what it needs, what is free, and what to do.
    """
    available = available_memory(device)
    if available is None:
        return
    if device.type == "cpu":
        available //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    size = replica_bytes(model)
    needed = COPIES * size
    if needed > available:
        found = (
            f"needs {needed / _GIB:.1f} GiB of {device} and the activations of a sub-batch: {COPIES} copies of "
            f"{size // 4:,} numbers in fp32; {available / _GIB:.1f} GiB are free"
        )
        where = "on a machine with more memory" if device.type == "cpu" else "with `nio-hf init RECIPE --device cpu`"
        fix = f"Initialise once {where}, then train from that checkpoint: model_name_or_path: OUTPUT_DIR/_nio_init"
        raise NIOMemoryError(Problem("NIO", found, fix))


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """The parameters of a model, whole on every process where DeepSpeed ZeRO-3 has spread them, within the context."""
    if not _is_partitioned(model):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        yield


def _is_partitioned(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _copy_partitioned(values: dict[str, nn.Parameter], model: nn.Module) -> None:
    """Write whole tensors into a model of ZeRO-3, of which each process then keeps its part."""
    import deepspeed

    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(values[name].data)


def _check_no_adapters(model: nn.Module) -> None:
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        fix = "Initialise the base model with run_nio() before adapters are added, or set nio=False"
        raise ModelError(Problem(type(model).__name__, "has adapters (PEFT), which NIO does not scale", fix))
