"""Memory: the peak of a run, free bytes, the size of a graph, and ways out where none is left."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from nio_hf.errors import ConfigError, NIOMemoryError, Problem, one_line

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CONTROL_GROUP = Path("/sys/fs/cgroup")
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine itself, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def release_memory(device: torch.device) -> None:
    """Free the memory that a failed attempt has left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def available_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device: on the CPU what Linux says is available, None where it is unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu" and sys.platform == "linux":
        return min(_machine_memory(), _control_group_memory())
    return None


def _machine_memory() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _control_group_memory() -> int:
    """Bytes below the limit of a container, not counting cached files; the largest number without a limit."""
    try:
        limit, used = (
            (_CONTROL_GROUP / f"memory.{name}").read_text(encoding="ascii").strip() for name in ("max", "current")
        )
        lines = (_CONTROL_GROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return sys.maxsize
    kept = sum(int(line.split()[1]) for line in lines if line.split()[0] in ("active_file", "inactive_file"))
    return sys.maxsize if limit == "max" else max(int(limit) - int(used) + kept, 0)


@contextlib.contextmanager
def graph_bytes(parameters: Sequence[Tensor]) -> Iterator[list[int]]:
    """Count the bytes that autograd saves inside the block, each storage once, parameters not counted.

    Yields:
        A list that holds the bytes when the block ends.
    """
    storages: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    counted: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = (tensor.detach().coalesce().values() if tensor.is_sparse else tensor).untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counted
    counted.append(sum(storages.values()))


def reset_peak_memory(device: torch.device) -> None:
    """Start counting anew where the allocator counts; a CPU process has one peak for its life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on CUDA, elsewhere the peak resident set of this process; 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def with_less_memory(
    compute: Callable[[int | None], T],
    size: int,
    micro_batch_size: int | None,
    *,
    where: str,
    device: torch.device,
    drop_kept: Callable[[], bool] = lambda: False,
    check_split: Callable[[int], None] | None = None,
) -> tuple[T, int | None]:
    """Compute, and try again with less memory where it runs out; the result stays the same but for rounding.

    First nothing is kept between the passes any more, then micro-batches are halved.

    Args:
        compute: Function that gives the result for a micro-batch size; it may be called several times.
        size: Number of samples that it works on.
        micro_batch_size: Samples computed at once in the first attempt; None for all.
        where: Name of the work in messages.
        device: Device whose memory it is.
        drop_kept: Function that forgets kept results; it returns False where there were none.
        check_split: Raises ConfigError where the samples cannot be computed in parts of a size; None where they
            never can.

    Returns:
        The result, and the micro-batch size that it took.

    Raises:
        NIOMemoryError: Where there is nothing left to give way.
    """
    while True:
        try:
            return compute(micro_batch_size), micro_batch_size
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = one_line(error)
        # Only outside of the handler does nothing hold the tensors of the attempt any more.
        release_memory(device)
        if drop_kept():
            logger.warning("%s: out of memory. Nothing is kept between the passes from here on.", where)
            continue
        before = min(micro_batch_size or size, size)
        micro_batch_size = _halved(before, where, reason, check_split)
        logger.warning(
            "%s: out of memory. Micro-batches of %d samples from here on, not %d.", where, micro_batch_size, before
        )


def _halved(size: int, where: str, reason: str, check_split: Callable[[int], None] | None) -> int:
    fix = "Give smaller batches, or a device with more memory"
    halved = (size + 1) // 2
    if check_split is None or halved == size:
        raise NIOMemoryError(Problem(where, f"out of memory for {size} samples at once ({reason})", fix))
    try:
        check_split(halved)
    except ConfigError as error:
        found = f"out of memory for {size} samples at once, and they cannot be split: {error.problems[0].found}"
        raise NIOMemoryError(Problem(where, found, fix)) from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        found = f"out of memory for {size} samples at once, and for the check that they can be split ({reason})"
        raise NIOMemoryError(Problem(where, found, fix)) from error
    return halved
