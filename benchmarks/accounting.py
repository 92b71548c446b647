"""Counting what a computation costs: operations, bytes, seconds. Counts need no device that could run it."""

from __future__ import annotations

import contextlib
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import conv_flop_count, flop_registry

from nio_hf.study.costs import OperationCount

Work = Callable[[], Any]


def _conv_backward(grad: Tensor, x: Tensor, w: Tensor, *settings: Any, out_val: Any = None, **more: Any) -> int:
    """Each wanted gradient of a convolution costs what its forward does; torch's own formula ignores groups."""
    transposed, output_mask = settings[4], settings[7]
    return sum(output_mask[:2]) * conv_flop_count(list(x.shape), list(w.shape), list(grad.shape), transposed)


_FORMULAS: dict[Any, Callable[..., int]] = {**flop_registry, torch.ops.aten.convolution_backward: _conv_backward}
"""{operation: number of operations of a call}."""


class Counts(OperationCount):
    """Counts operations and live bytes of what is computed in it.

    Attributes:
        peak: the largest number of bytes alive at once, of storages made in it; those held by graphs are included.
    """

    formulas = _FORMULAS

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._bytes = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry out an operation, and count it and what it makes."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._alive and all(storage._cdata != key for key in _storages((args, kwargs))):
                self._track(storage)
        self.peak = max(self.peak, self._bytes)
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._alive.add(key)
        self._bytes += size
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._alive.remove(key)
        self._bytes -= size


def counted(work: Work) -> Counts:
    """What some work counts to; what exists before does not count."""
    with Counts() as counts:
        work()
    return counts


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _storages(value: Any) -> Iterator[int]:
    return (tensor.untyped_storage()._cdata for tensor in _tensors(value))


def allocator_bytes(work: Work) -> int:
    """The same by the CPU allocator's own events, to hold `Counts.peak` against."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def cuda_bytes(work: Work) -> int:
    """Peak of the CUDA allocator above what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def median_seconds(works: Mapping[str, Work], rounds: int, device: torch.device) -> dict[str, float]:
    """Median wall time of each work, one after the other in each round, so that all meet the same machine.

    Each is to have run once before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(_seconds(work, device))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _seconds(work: Work, device: torch.device) -> float:
    with _synchronised(device):
        started = time.perf_counter()
        work()
    return time.perf_counter() - started


@contextlib.contextmanager
def _synchronised(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
