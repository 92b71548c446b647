"""Checkpoints of DeepSpeed read without running what a file asks for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_FORBID = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Let torch.load read tensors and the plain classes of a DeepSpeed checkpoint, and nothing else.

    DeepSpeed asks for `weights_only=False`, which would run any code that someone has put into the file.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    former = {name: os.environ.pop(name, None) for name in (_FORCE, _FORBID)}
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]):
            yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in former.items() if value is not None})
