"""Another range: all weights larger by a factor, as another `initializer_range` makes them."""

from __future__ import annotations

import math
from typing import Any

from nio_hf.core.config import is_positive
from nio_hf.core.method import Learned, Method, Options, Watch
from nio_hf.core.problem import ScalingProblem
from nio_hf.errors import ModelError, Problem

_WIDTHS = ("embed_dim", "hidden_size", "n_embd", "dim", "d_model")


def scale_range(problem: ScalingProblem, options: Options, watch: Watch) -> Learned:
    """Multiply matrices, tables and tokens by a factor, and what is added to activations by a further one.

    Without a factor, it is the one that gives the standard deviation 1 / sqrt(width) to weights that have the
    `initializer_range` of the model's config. The width is `hidden_size`, or what other families call it; in a model
    whose stages have several widths it is that of the first one. Norms and biases are left alone. No batch is used.

    Options:
        factor: None for 1 / (sqrt(width) initializer_range).
        additive: Further factor of positions, tokens and other tensors of the kind "additive".

    Raises:
        ModelError: A model whose config has no width or no range, where no factor is given.
    """
    factor = options["factor"] or _by_width(problem.loss.model)
    for place in problem.tensors.scaled:
        if place.kind not in ("norm", "bias", "vector"):
            place.parameter.data.mul_(factor * (options["additive"] if place.kind == "additive" else 1))
    return Learned()


def _by_width(model: Any) -> float:
    config = getattr(model, "config", None)
    widths: list[float] = [getattr(config, name) for name in _WIDTHS if is_positive(getattr(config, name, None))]
    initial: float = getattr(config, "initializer_range", 0.0)
    if not widths or not is_positive(initial):
        fix = "Give a factor, e.g. 4, or choose a model of transformers that has both"
        raise ModelError(Problem(type(model).__name__, "a config without initializer_range and hidden_size", fix))
    return 1 / (math.sqrt(widths[0]) * initial)


RANGE = Method(
    name="range",
    title="another range",
    describe=lambda config: "All weights were multiplied by a factor, as another initializer_range makes them.",
    learn=scale_range,
    options={"factor": None, "additive": 1.0},
    check=lambda options: [
        (
            "factor",
            options["factor"],
            options["factor"] is None or is_positive(options["factor"]),
            "Give a finite number above 0, such as 4, or leave it out for that by width",
        ),
        ("additive", options["additive"], is_positive(options["additive"]), "Give a finite number above 0, such as 32"),
    ],
)
"""Another standard deviation."""
