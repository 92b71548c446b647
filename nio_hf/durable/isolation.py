"""Random numbers drawn beside a training, without an effect on it."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

OwnGenerator = torch.Generator | random.Random | np.random.Generator | np.random.RandomState

_MAX_ENTRIES, _MAX_VALUES = 100, 10_000
_OPAQUE = type | str | bytes | torch.Tensor | torch.nn.Module | np.ndarray | random.SystemRandom
"""Types that are not searched for generators; SystemRandom has no state."""


@contextlib.contextmanager
def isolated_random_state(device: torch.device, *owners: Any) -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch (CPU and `device`) at the end of the context.

    The generators that `owners` hold are restored, too: data sets and collators may draw from a generator of their own.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    restorers = [_restorer(generator) for generator in own_generators(*owners)]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            for restore in restorers:
                restore()


def own_generators(*owners: Any) -> list[OwnGenerator]:
    """Return the generators among values, in their attributes, in short containers, and in arguments of partials."""
    found: list[OwnGenerator] = []
    seen: set[int] = set()
    left = [*reversed(owners)]
    while left and len(seen) < _MAX_VALUES:
        value = left.pop()
        if id(value) in seen or isinstance(value, _OPAQUE):
            continue
        seen.add(id(value))
        if isinstance(value, OwnGenerator):
            found.append(value)
        else:
            left += reversed(_held_by(value))
    return found


def reseed(generator: OwnGenerator, seed: int) -> None:
    """Seed a generator with 63 bits, whatever was drawn from it."""
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
    """Return a function that brings a generator back into its present state."""
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state(legacy=False))
    return functools.partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)


def _held_by(value: Any) -> list[Any]:
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, dict | list | tuple):
        held = list(value.values() if isinstance(value, dict) else value)
        return held if len(held) <= _MAX_ENTRIES else []
    return [vars(value)] if hasattr(value, "__dict__") else []
