"""Random numbers that are drawn beside a training, and that it must not miss."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

OwnGenerator = torch.Generator | random.Random | np.random.Generator | np.random.RandomState

_MAX_ENTRIES, _MAX_VALUES = 100, 10_000
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
    return list(_generators(owners))


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


def _generators(owners: Iterable[Any]) -> Iterator[OwnGenerator]:
    """The generators in some values: themselves, in attributes, in short containers, or in what a partial binds."""
    seen: set[int] = set()
    left = [*reversed(list(owners))]
    while left and len(seen) < _MAX_VALUES:
        value = left.pop()
        if id(value) in seen or isinstance(value, _OPAQUE):
            continue
        seen.add(id(value))
        if isinstance(value, OwnGenerator):
            yield value
        else:
            left += reversed(_held_by(value))


def _held_by(value: Any) -> list[Any]:
    """What a value holds, as far as it is searched."""
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    if held is not None:
        return list(held) if len(held) <= _MAX_ENTRIES else []
    return [vars(value)] if hasattr(value, "__dict__") else []
