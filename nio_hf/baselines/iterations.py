"""The iterations of a method that learns scales, each on the next batch."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from nio_hf.core.config import is_count, is_positive, is_range_around_one
from nio_hf.core.method import Check, Learned, Options, Watch
from nio_hf.core.problem import ScalingProblem
from nio_hf.core.result import IterationRecord

State = TypeVar("State")

POSITIVE = "Give a finite number above 0"


def iterate(
    problem: ScalingProblem,
    options: Options,
    watch: Watch,
    state: State,
    step: Callable[[int, Any, State], tuple[State, IterationRecord]],
) -> tuple[State, Learned]:
    """The state after all iterations, or after as many as there are batches for, with the records.

    Every process takes each step by itself, on the whole batch, and what rank 0 found counts.

    Args:
        problem: gives the batches.
        options: `iterations` is used.
        watch: who follows.
        state: before the first iteration, in plain values that processes can send each other.
        step: (iteration, batch, state) -> state and record after it.
    """
    history: list[IterationRecord] = []
    exhausted = False
    for iteration in range(1, options["iterations"] + 1):
        started = time.perf_counter()
        batch = problem.stream.next()
        (exhausted,) = problem.collective.any(batch is None)
        if exhausted:
            break
        if watch.on_trial is not None:
            watch.on_trial(describe_step(options))
        with problem.collective.together():
            found = step(iteration, batch, state)
        state, record = problem.collective.broadcast_object(found)
        history.append(dataclasses.replace(record, seconds=time.perf_counter() - started))
        if watch.on_iteration is not None:
            watch.on_iteration(history[-1])
    cost = math.fsum(record.cost for record in history)
    return state, Learned(history=history, cost=cost, data_exhausted=exhausted)


def describe_step(options: Options) -> str:
    """What an iteration tries."""
    return f"a step of {options['lr']:g}"


def move(scales: Sequence[float], changes: Iterable[float], options: Options) -> tuple[float, ...]:
    """The scales after a change, within the option `scale_range`."""
    least, largest = options["scale_range"]
    return tuple(min(max(scale + change, least), largest) for scale, change in zip(scales, changes, strict=True))


def iteration_checks(options: Options) -> Iterator[Check]:
    """Checks of the options `iterations`, `lr` and `scale_range`."""
    iterations, lr, scale_range = (options[name] for name in ("iterations", "lr", "scale_range"))
    yield "iterations", iterations, is_count(iterations), "Give a whole number of at least 1"
    yield "lr", lr, is_positive(lr), POSITIVE
    fix = "Give two numbers, 0 < first <= 1 <= second"
    yield "scale_range", scale_range, is_range_around_one(scale_range), fix
