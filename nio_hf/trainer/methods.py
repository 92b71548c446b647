"""The methods that a training can be initialised by: NIO, and the baselines to compare it with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from nio_hf.baselines import METHODS as BASELINES
from nio_hf.core import NIO, Collective, InitResult, IterationRecord, Method, NIOConfig, initialize
from nio_hf.core.loss import LossFn
from nio_hf.errors import Problem
from nio_hf.trainer.replica import broadcast

METHODS: dict[str, Method] = {NIO.name: NIO, **BASELINES}
"""{name: method}."""


def parsed_mapping(options: dict[str, Any] | str | None) -> Any:
    """A mapping, which a command line gives as JSON; text that is no JSON as it is."""
    if not isinstance(options, str):
        return options
    try:
        return json.loads(options)
    except ValueError:
        return options


def method_problems(name: Any, options: Any) -> Iterator[Problem]:
    """The problems of `nio_method` and `nio_method_kwargs`; the method checks the values of its options itself."""
    if name not in METHODS:
        yield Problem("nio_method", f"{name!r}", f"Choose one of {', '.join(METHODS)}")
        return
    if options is None:
        return
    if not isinstance(options, dict):
        yield Problem("nio_method_kwargs", f"{options!r}", 'Give a mapping, e.g. {"optimizer": "sgd"}')
        return
    known = list(METHODS[name].options)
    for key in options:
        if key not in known:
            fix = f"Choose from {', '.join(known)}" if known else "Leave it out: it has none of its own"
            yield Problem("nio_method_kwargs", f"{key!r} is no option of {name}", fix)


def run_baseline(
    method: Method,
    options: dict[str, Any],
    replica: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    config: NIOConfig,
    collective: Collective,
    *,
    on_iteration: Callable[[IterationRecord], None] | None = None,
    on_trial: Callable[[str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> InitResult:
    """Initialise a replica by another method than NIO, on rank 0, whose weights the others are given.

    Raises:
        NIOError: As in [`initialize`].
    """
    result = None
    with collective.together():
        if collective.rank == 0:
            result = initialize(
                replica,
                batches,
                loss_fn,
                config,
                method=method,
                options=options,
                on_iteration=on_iteration,
                on_trial=on_trial,
                should_stop=should_stop,
                collective=Collective(),
            )
    broadcast(replica, collective)
    shared: InitResult = collective.broadcast_object(result)  # type: ignore[assignment]
    return shared
