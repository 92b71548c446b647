"""What the mixins of this package share, whichever of them a Trainer is made of."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import Trainer

from nio_hf.durable.preemption import PreemptionCallback

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class TrainerMixin(_Base):
    """The base of the mixins.

    Attributes:
        preemption: says whether SIGTERM has come; None without [`DurableTrainerMixin`] or `enable_jit_checkpoint`.
        resumed_from: folder that the last training resumed from; None for one that began, and without that mixin.
    """

    preemption: PreemptionCallback | None = None
    resumed_from: Path | None = None

    @property
    def unwrapped_model(self) -> nn.Module:
        """The model itself, inside of what the training wraps it in."""
        return cast(nn.Module, self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _tell(self, logger: logging.Logger, message: str, *values: Any, level: int = logging.INFO) -> None:
        """Log a message, on the main process only."""
        if self.is_world_process_zero():
            logger.log(level, message, *values)
