"""Digests of tensors, by which weights and batches are known again."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from nio_hf.core.batches import map_tensors


def fingerprint(model: nn.Module) -> str:
    """Digest of the parameters, whatever their names and order; tied ones count once.

    The SHA-256 of the sorted SHA-256 digests of dtype, shape and bytes of each parameter.
    """
    digests = sorted(_digest(parameter) for parameter in model.parameters())
    return hashlib.sha256(b"".join(digests)).hexdigest()


def batch_digest(batch: Any) -> str:
    """Digest of the tensors of a batch, in their order, whatever they are nested in."""
    digests: list[bytes] = []

    def collect(tensor: torch.Tensor) -> torch.Tensor:
        digests.append(_digest(tensor))
        return tensor

    map_tensors(collect, batch)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _digest(tensor: torch.Tensor) -> bytes:
    values = tensor.detach().cpu().contiguous()
    header = f"{values.dtype} {tuple(values.shape)}".encode()
    return hashlib.sha256(header + values.reshape(-1).view(torch.uint8).numpy().tobytes()).digest()
