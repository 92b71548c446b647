"""Floating point operations of matrix products, convolutions and attention, counted as they are carried out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class OperationCount(TorchDispatchMode):
    """Counts by the formulas of torch, as `torch.utils.flop_counter.FlopCounterMode` does.

    That one also tells modules apart and looks for a decomposition of every operation, which makes NIO on a small model
    several times slower; a sum needs neither.

    Attributes:
        formulas: {operation: number of floating point operations of a call}.
        operations: so far.
    """

    formulas: Mapping[Any, Callable[..., int]] = flop_registry

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Carry out an operation, and count it."""
        result = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **(kwargs or {}), out_val=result)
        return result
