"""Peak memory of a run, by what the device can tell."""

from __future__ import annotations

import sys

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine itself, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


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
