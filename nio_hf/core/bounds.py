"""The bounds that an accepted point keeps, on the batches that the search judges by."""

from __future__ import annotations

import dataclasses
import math

from nio_hf.core.config import NIOConfig
from nio_hf.core.result import Outcome, Reading


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Absolute bounds on loss and gradient norm.

    Attributes:
        most_loss: largest mean loss.
        least_norm: smallest GN.
        most_norm: largest GN.
    """

    most_loss: float = math.inf
    least_norm: float = 0.0
    most_norm: float = math.inf

    @classmethod
    def of(cls, config: NIOConfig, start: Reading, common: Reading | None = None) -> Bounds:
        """The bounds of a search.

        Args:
            config: settings.
            start: the reading at omega = 1, which the bound on the loss is relative to.
            common: that at the common factor, which the norm band of the groups is relative to. None while the common
                factor is tried: larger weights have larger gradients, so that the norm of the start bounds it
                from below only.
        """
        loss = start.measured.loss
        most_loss = math.inf if config.loss_bound is None else loss + config.loss_bound * abs(loss)
        least, most = (0.0, math.inf) if config.norm_band is None else config.norm_band
        if common is None:
            return cls(most_loss, least * start.measured.grad_norm)
        return cls(most_loss, least * common.measured.grad_norm, most * common.measured.grad_norm)

    def broken_by(self, reading: Reading) -> Outcome | None:
        """The bound that a point breaks; None where it keeps both."""
        loss = reading.measured.loss
        if not (math.isfinite(loss) and loss <= self.most_loss):
            return "loss_bound"
        if not self.least_norm <= reading.measured.grad_norm <= self.most_norm:
            return "norm_band"
        return None
