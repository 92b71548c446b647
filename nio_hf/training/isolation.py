"""Random numbers that NIO draws and training must not miss."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

OwnGenerator = torch.Generator | random.Random | np.random.Generator | np.random.RandomState

_MAX_ENTRIES = 100
_OPAQUE = type | str | bytes | torch.Tensor | torch.nn.Module | np.ndarray | random.SystemRandom
"""Kinds of values that are not searched for generators; the numbers of the system have no state."""


@contextlib.contextmanager
def isolated_random_state(device: torch.device, *owners: Any) -> Iterator[None]:
    """Leave random state as it was found.

    That of Python, NumPy and torch (the CPU and `device`), and of the generators that are attributes of `owners` or of
    what they hold: data sets and collators may draw from a generator of their own.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    restore_own = [_restorer(generator) for generator in own_generators(*owners)]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            for restore in restore_own:
                restore()


def own_generators(*owners: Any) -> list[OwnGenerator]:
    """The generators that are attributes of `owners` or of what they hold, in the order of the attributes."""
    return list(_generators(owners, set()))


def reseed(generator: OwnGenerator, seed: int) -> None:
    """Bring a generator into the state that a seed of 63 bits gives, whatever was drawn from it."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        bits.state = type(bits)(seed).state
    else:
        kind: Any = type(generator._bit_generator)
        generator.set_state(np.random.RandomState(kind(seed)).get_state(legacy=False))


def _restorer(generator: OwnGenerator) -> Callable[[], Any]:
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: generator.set_state(state)
    if isinstance(generator, random.Random):
        python_state = generator.getstate()
        return lambda: generator.setstate(python_state)
    if isinstance(generator, np.random.RandomState):
        legacy_state = generator.get_state(legacy=False)
        return lambda: generator.set_state(legacy_state)
    bits = generator.bit_generator
    numpy_state = bits.state
    return lambda: setattr(bits, "state", numpy_state)


def _generators(value: Any, seen: set[int]) -> Iterator[OwnGenerator]:
    """The generators in a value: itself, in its attributes, in a short container, or in what a partial binds."""
    if id(value) in seen or isinstance(value, _OPAQUE):
        return
    seen.add(id(value))
    if isinstance(value, OwnGenerator):
        yield value
    elif isinstance(value, dict | list | tuple):
        if len(value) <= _MAX_ENTRIES:
            for item in value.values() if isinstance(value, dict) else value:
                yield from _generators(item, seen)
    elif isinstance(value, functools.partial):
        for part in (value.func, value.args, value.keywords):
            yield from _generators(part, seen)
    elif hasattr(value, "__dict__"):
        yield from _generators(vars(value), seen)
