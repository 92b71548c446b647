"""Checkpoints of DeepSpeed read without running what a file asks for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Let torch.load read tensors and the plain classes of a DeepSpeed checkpoint, and nothing else.

    DeepSpeed asks for `weights_only=False`, which would run any code that someone has put into the file.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    former = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]):
            yield
    finally:
        if former is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = former
