"""The processes that share a NIO run: who computes which sub-batch, sums over all, and errors that stop all.

A process that fails must not leave the others waiting for it. So all code that can fail runs inside of
[`Collective.together`], and sums and broadcasts follow directly on the end of such a block.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

import nio_hf.errors
from nio_hf.core.memory import is_out_of_memory
from nio_hf.errors import NIOError, NIOMemoryError, NumericsError, Problem, RankError, one_line

T = TypeVar("T")

SIGNALS = 3
"""Numbers in which processes tell each other how it goes."""
_EVERYWHERE = "everywhere"
_SAME = "Give all processes the same model class, settings and data, and devices of one kind"


@dataclasses.dataclass(frozen=True)
class Collective:
    """A group of processes, by default this one alone.

    Attributes:
        rank: Rank of this process.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Collective:
        """The default torch.distributed group, or this process alone where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def owned(self, sub_batches: int) -> range:
        """The sub-batches of this process: d with d mod size = rank."""
        return range(self.rank, sub_batches, self.size)

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes, the same to the bit on all."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def broadcast_(self, tensor: Tensor) -> None:
        """Replace a tensor, contiguous or not, by that of rank 0."""
        if self.size > 1:
            sent = tensor.contiguous()
            dist.broadcast(sent, 0)
            if sent is not tensor:
                tensor.copy_(sent)

    def broadcast_object(self, value: T) -> T:
        """The value that rank 0 holds. Call it directly behind a block of [`together`]."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def any(self, *flags: bool) -> list[bool]:
        """For each of at most two flags, whether it is set on any process.

        Raises:
            NIOError: Where another process has failed, as [`together`].
        """
        return self._exchange(None, flags)

    def wait(self) -> None:
        """Wait until all processes are here.

        Raises:
            NIOError: Where another process has failed, as [`together`].
        """
        self._exchange(None, ())

    def first(self, flag: bool) -> bool:
        """The flag of rank 0."""
        return self.any(flag and self.rank == 0)[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Let an error of one process stop all of them, with the same message, which names its rank.

        Blocks may be nested. An error that all processes have in common is raised as it is.

        Raises:
            NIOError: The one that was raised on some process.
            NIOMemoryError: Where a process ran out of memory.
            RankError: Where a process raised anything else.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.size == 1 or is_shared(error):
                raise
            failure = error
        self._exchange(failure, ())

    def check_equal(self, what: str, value: object, fix: str = _SAME) -> None:
        """Refuse a value, e.g. a digest, that is another one on another process.

        Args:
            what: Name of the value in messages.
            value: Value on this process.
            fix: Advice on how to make it the same.

        Raises:
            NumericsError: Names the ranks that differ from rank 0.
        """
        self.wait()
        if self.size == 1:
            return
        values: list[object] = [None] * self.size
        dist.all_gather_object(values, value)
        # NaN equals itself only as text.
        same = [other == values[0] or repr(other) == repr(values[0]) for other in values]
        others = [str(rank) for rank, is_same in enumerate(same) if not is_same]
        if others:
            found = f"not the same on rank 0 and rank {', '.join(others)}"
            raise _marked(NumericsError(Problem(what, found, fix)))

    def _exchange(self, failure: Exception | None, flags: Sequence[bool]) -> list[bool]:
        """Tell the others how it goes. One size fits all, since a process that failed does not know what is asked."""
        if self.size == 1:
            return list(flags)
        sent = [failure is not None, *flags]
        counts = torch.zeros(SIGNALS, dtype=torch.int32, device=_device())
        counts[: len(sent)] = torch.tensor(sent, dtype=torch.int32)
        dist.all_reduce(counts)
        failed, *received = [count > 0 for count in counts.tolist()]
        if failed:
            self._raise_everywhere(failure)
        return received[: len(flags)]

    def _raise_everywhere(self, failure: Exception | None) -> None:
        gathered: list[tuple[str, list[Problem]] | None] = [None] * self.size
        dist.all_gather_object(gathered, None if failure is None else _description(failure))
        reports = {rank: report for rank, report in enumerate(gathered) if report is not None}
        first = min(reports)
        in_common = all(report == reports[first] for report in reports.values()) and len(reports) == self.size
        if failure is not None and in_common:
            raise _marked(failure)
        problems = [_at_rank(rank, problem) for rank, report in reports.items() for problem in report[1]]
        error: NIOError = getattr(nio_hf.errors, reports[first][0])(*problems)
        raise _marked(error) from failure


def is_shared(error: Exception) -> bool:
    """Whether all processes raise this error."""
    return getattr(error, _EVERYWHERE, False)


def _device() -> torch.device:
    """Where small numbers are exchanged: the CPU where the group has a backend for it."""
    if "cpu:" in dist.get_backend_config():
        return torch.device("cpu")
    accelerator = cast(torch.device, torch.accelerator.current_accelerator())
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _marked(error: Exception) -> Exception:
    """An error that all processes raise, so that an outer block does not wait for those that left it already."""
    setattr(error, _EVERYWHERE, True)
    return error


def _description(error: Exception) -> tuple[str, list[Problem]]:
    """The class of our errors that stands for an error, and its problems."""
    if isinstance(error, NIOError):
        problems = list(error.problems) or [Problem("", str(error), "The traceback is that of this rank")]
        known = next(base for base in type(error).__mro__ if base.__module__ == NIOError.__module__)
        return known.__name__, problems
    found = f"{type(error).__name__}: {one_line(error)}"
    if is_out_of_memory(error):
        fix = "Set NIOConfig.micro_batch_size, or give smaller batches"
        return NIOMemoryError.__name__, [Problem("", f"out of memory ({found})", fix)]
    return RankError.__name__, [Problem("", found, "Look at the traceback of this rank; the others stopped with it")]


def _at_rank(rank: int, problem: Problem) -> Problem:
    return dataclasses.replace(problem, where=", ".join(filter(None, (f"rank {rank}", problem.where))))
