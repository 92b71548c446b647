"""Other methods of initialisation, each a function of one signature, to compare NIO with.

    method(model, batches, loss_fn, config=None, *, holdout=None, on_iteration=None, collective=..., **its own options)

All of them measure GC, GN and loss before and after on held-out batches, work on copies of the weights, and change the
model at the very end, whole or not at all. They are written from the papers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from nio_hf.baselines.architecture_aware import architecture_aware, maximal_learning_rate, residual_path_depths
from nio_hf.baselines.emergence import emergence
from nio_hf.baselines.gradinit import DEFAULTS as GRADINIT_DEFAULTS
from nio_hf.baselines.gradinit import gradinit
from nio_hf.baselines.lsuv import lsuv
from nio_hf.baselines.metainit import DEFAULTS as METAINIT_DEFAULTS
from nio_hf.baselines.metainit import metainit
from nio_hf.baselines.none import no_method
from nio_hf.core import InitResult, NIOConfig
from nio_hf.errors import ConfigError, Problem

__all__ = [
    "METHODS",
    "Method",
    "architecture_aware",
    "defaults_of",
    "emergence",
    "gradinit",
    "lsuv",
    "maximal_learning_rate",
    "metainit",
    "no_method",
    "options_of",
    "residual_path_depths",
]

Method = Callable[..., InitResult]

METHODS: dict[str, Method] = {
    "none": no_method,
    "gradinit": gradinit,
    "metainit": metainit,
    "lsuv": lsuv,
    "emergence": emergence,
    "architecture_aware": architecture_aware,
}
"""{name: method}."""

_DEFAULTS = {"gradinit": GRADINIT_DEFAULTS, "metainit": METAINIT_DEFAULTS}
_SHARED = ("holdout", "on_iteration", "collective")


def defaults_of(name: str) -> NIOConfig:
    """The shared settings of a method where none are given."""
    return _DEFAULTS.get(name, NIOConfig())


def options_of(name: str) -> dict[str, Any]:
    """{option: default} of the options that a method has of its own.

    Raises:
        ConfigError: for a name that is not in `METHODS`.
    """
    if name not in METHODS:
        raise ConfigError(Problem("method", repr(name), f"Choose one of {', '.join(METHODS)}"))
    parameters = inspect.signature(METHODS[name]).parameters.values()
    own = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in _SHARED]
    return {parameter.name: parameter.default for parameter in own}
