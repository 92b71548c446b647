"""The initialisation that a model has, measured as the others are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from nio_hf.core import Collective, InitResult, NIOConfig
from nio_hf.core.differentiator import LossFn
from nio_hf.core.method import SINGLE_PROCESS, Learned, OnIteration, Workspace, run_method


def no_method(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    config: NIOConfig | None = None,
    *,
    holdout: Sequence[Any] | None = None,
    on_iteration: OnIteration | None = None,
    collective: Collective = SINGLE_PROCESS,
) -> InitResult:
    """Measure a model on the held-out batches and leave it as it is; the point of comparison.

    Args:
        model: as in [`initialize`], and likewise what follows.
        batches: see there; only the held-out ones are used.
        loss_fn: see there.
        config: `sub_batches`, `holdout_batches` and how to compute are used.
        holdout: see there.
        on_iteration: never called.
        collective: see there.

    Returns:
        The measurement, twice, with omega = 1 for every tensor.

    Raises:
        NIOError: as in [`initialize`].
    """
    return run_method(
        "none",
        _leave,
        model,
        batches,
        loss_fn,
        config,
        iterations=0,
        holdout=holdout,
        on_iteration=on_iteration,
        collective=collective,
    )


def _leave(workspace: Workspace) -> Learned:
    return Learned()
