"""Room where memory runs out: first nothing is kept between the passes, then micro-batches are halved."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from nio_hf.core.batches import batch_size
from nio_hf.core.curvature import CurvaturePath
from nio_hf.core.differentiator import Differentiator
from nio_hf.core.memory import is_out_of_memory, release_memory
from nio_hf.errors import ConfigError, NIOMemoryError, Problem, one_line

logger = logging.getLogger(__name__)

T = TypeVar("T")


class BackOff:
    """Computes again with less memory what ran out of it; what is computed stays the same but for rounding.

    Args:
        differentiator: its micro-batch size is halved.
        splittable: whether a sub-batch may be computed in parts, which the batch statistics of batch normalisation
            forbid.
    """

    def __init__(self, differentiator: Differentiator, splittable: bool) -> None:
        self._differentiator = differentiator
        self._splittable = splittable

    def run(self, compute: Callable[[], T], batch: Any, where: str, path: CurvaturePath | None = None) -> T:
        """The result of `compute`, which works on `batch` and may be called several times.

        Raises:
            NIOMemoryError: where there is nothing left to give way.
        """
        while True:
            try:
                return compute()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = one_line(error)
            # Only outside of the handler does nothing hold the tensors of the attempt any more.
            release_memory(self._differentiator.device)
            self._make_room(batch, where, reason, path)

    def _make_room(self, batch: Any, where: str, reason: str, path: CurvaturePath | None) -> None:
        if path is not None and path.give_way():
            logger.warning("%s: out of memory. Nothing is kept between the passes from here on.", where)
            return
        size = min(self._differentiator.micro_batch_size or batch_size(batch), batch_size(batch))
        halved = (size + 1) // 2
        fix = "Give smaller batches, or a device with more memory"
        if not self._splittable:
            fix = f'Set batch_norm="frozen", which allows micro-batches. {fix}'
        if not self._splittable or halved == size:
            raise NIOMemoryError(Problem(where, f"out of memory for {size} samples at once ({reason})", fix))
        try:
            self._differentiator.check_splits(batch, halved)
        except ConfigError as error:
            found = f"out of memory for {size} samples at once, and they cannot be split: {error.problems[0].found}"
            raise NIOMemoryError(Problem(where, found, error.problems[0].fix)) from error
        self._differentiator.micro_batch_size = halved
        logger.warning("%s: out of memory. Micro-batches of %d samples from here on, not %d.", where, halved, size)
