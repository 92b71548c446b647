"""Random numbers that NIO draws and training must not miss."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

_MAX_ENTRIES = 100


@contextlib.contextmanager
def isolated_random_state(device: torch.device, *owners: Any) -> Iterator[None]:
    """Leave random state as it was found.

    That of Python, NumPy and torch (the CPU and `device`), and of the generators that are attributes of `owners` or of
    what they hold: data sets and collators may draw from a generator of their own.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    restore_own = [_restorer(generator) for generator in _generators(owners, set())]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            for restore in restore_own:
                restore()


def _restorer(generator: Any) -> Callable[[], Any]:
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: generator.set_state(state)
    if isinstance(generator, random.Random):
        python_state = generator.getstate()
        return lambda: generator.setstate(python_state)
    bits = generator.bit_generator if isinstance(generator, np.random.Generator) else generator._bit_generator
    numpy_state = bits.state
    return lambda: setattr(bits, "state", numpy_state)


def _generators(value: Any, seen: set[int]) -> Iterator[Any]:
    """The generators in a value: itself, in its attributes, or in a short container."""
    if id(value) in seen or isinstance(value, type | str | bytes | torch.Tensor | torch.nn.Module | np.ndarray):
        return
    seen.add(id(value))
    if isinstance(value, torch.Generator | random.Random | np.random.Generator | np.random.RandomState):
        yield value
    elif isinstance(value, dict | list | tuple):
        if len(value) <= _MAX_ENTRIES:
            for item in value.values() if isinstance(value, dict) else value:
                yield from _generators(item, seen)
    elif hasattr(value, "__dict__"):
        yield from _generators(vars(value), seen)
