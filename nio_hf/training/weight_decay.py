"""Which parameters weight decay applies to, as the published trainings choose them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from nio_hf.errors import ModelError, Problem

VECTORS = "vectors"


def decayed_parameters(model: nn.Module, without: Sequence[str]) -> list[str]:
    """Names of the parameters with weight decay.

    Args:
        model: whose parameters they are.
        without: those left out: "vectors" for all of fewer than two dimensions (biases, normalisation, layer scale),
            any other by the last part of its name, e.g. "cls_token" or "relative_position_bias_table".

    Raises:
        ModelError: for a name that no parameter has.
    """
    last_parts = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    unknown = [name for name in without if name != VECTORS and name not in last_parts]
    if unknown:
        problems = []
        for name in unknown:
            near = difflib.get_close_matches(name, last_parts, n=1)
            fix = (
                f"Did you mean {near[0]!r}?" if near else f"Choose {VECTORS} or one of {', '.join(sorted(last_parts))}"
            )
            problems.append(Problem("no_weight_decay", f"{type(model).__name__} has no parameter {name!r}", fix))
        raise ModelError(*problems)
    return [
        name
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] not in without and not (VECTORS in without and parameter.ndim < 2)
    ]
