"""Mimetic initialisation: attention that starts as that of trained Transformers looks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from nio_hf.baselines.attention import Attention, attention_layers, uniform
from nio_hf.baselines.positions import position_tables, sine_cosine
from nio_hf.core.config import is_number
from nio_hf.core.method import Check, Learned, Method, Options, Watch
from nio_hf.core.problem import ScalingProblem
from nio_hf.errors import ModelError, Problem

logger = logging.getLogger(__name__)
Draw = Callable[[Tensor], Tensor]


def draw_mimetic(problem: ScalingProblem, options: Options, watch: Watch) -> Learned:
    """Draw the projections of attention so that queries look at their own position and values are subtracted.

        per head    A = query_key (N + I) = U S V^T     W_q = (U S^(1/2))_k^T     W_k = (S^(1/2) V^T)_k
        per layer   A = value_output (N - I) = U S V^T  W_v = S^(1/2) V^T         W_o = U S^(1/2)

    N is of the shape (d, d) with entries from U(-sqrt(3/d), sqrt(3/d)), drawn anew for each A, and k the head size, so
    that W_q^T W_k is the best approximation of A of rank k, and W_o W_v = A. Position tables of a grid get the sines
    and cosines of the paper as values; they are trained, where the paper keeps them. All other tensors are left as
    they are. No batch is used; the seed decides.

    Options:
        query_key: 0.7.
        value_output: 0.4.
        positions: Whether position tables are set; tables that are not of a grid are left alone, with a warning.
        control: Whether matrices of normal entries with the same norms are drawn instead, to tell structure from size.

    Raises:
        ModelError: A model without attention layers, or with others than ones of d to d.

    Source: Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", ICML 2023, arXiv 2305.09828.
    """
    generator = torch.Generator().manual_seed(problem.config.seed)
    for layer in attention_layers(problem.loss.model, problem.tensors):
        check_square(layer)
        set_query_key(layer, options["query_key"], generator, control=options["control"])
        set_value_output(layer, options["value_output"], generator, control=options["control"])
    if options["positions"]:
        for table in position_tables(problem.loss.model, problem.tensors):
            if table.side is None:
                logger.warning("Mimetic initialisation leaves %s as it is: they are of no square grid.", table.name)
            else:
                table.values.copy_(sine_cosine(table.side, table.values.shape[-1]))
    return Learned()


def check_square(layer: Attention) -> None:
    """Refuse attention whose keys have fewer heads, or whose heads do not fill the width.

    Raises:
        ModelError: With the shapes.
    """
    width = layer.queries.shape[1]
    shapes = [tuple(matrix.shape) for matrix in (layer.queries, layer.keys, layer.values, layer.output)]
    if set(shapes) != {(width, width)}:
        found = f"projections of the shapes {', '.join(map(str, shapes))}"
        fix = "Choose a model whose queries, keys and values are as wide as the model"
        raise ModelError(Problem(layer.name, found, fix))


def set_query_key(layer: Attention, share: float, generator: torch.Generator, *, control: bool) -> None:
    """The query and key projections, head by head."""
    size = layer.head_size
    for queries, keys in zip(layer.queries.split(size), layer.keys.split(size), strict=True):
        left, right = _roots(share * (_noise(layer.queries, generator) + torch.eye(queries.shape[1])))
        _write(queries, left[:, :size].T, generator, control=control)
        _write(keys, right[:size], generator, control=control)


def set_value_output(layer: Attention, share: float, generator: torch.Generator, *, control: bool) -> None:
    """The value and output projections."""
    left, right = _roots(share * (_noise(layer.values, generator) - torch.eye(layer.values.shape[1])))
    _write(layer.values, right, generator, control=control)
    _write(layer.output, left, generator, control=control)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    width = like.shape[1]
    return uniform(torch.empty(width, width, dtype=torch.float64), math.sqrt(3 / width), generator)


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """U S^(1/2) and S^(1/2) V^T of a matrix U S V^T."""
    left, values, right = torch.linalg.svd(matrix)
    return left * values.sqrt(), values.sqrt()[:, None] * right


def _write(weight: Tensor, values: Tensor, generator: torch.Generator, *, control: bool) -> None:
    if control:
        drawn = torch.randn(values.shape, generator=generator, dtype=values.dtype)
        values = drawn * (values.norm() / drawn.norm())
    weight.copy_(values)


def _check(options: Options) -> list[Check]:
    shares = [(name, options[name]) for name in ("query_key", "value_output")]
    switches = [(name, options[name]) for name in ("positions", "control")]
    return [
        *((name, value, is_number(value) and value > 0, "Give a finite number above 0") for name, value in shares),
        *((name, value, isinstance(value, bool), "Give true or false") for name, value in switches),
    ]


MIMETIC = Method(
    name="mimetic",
    title="mimetic initialisation",
    describe=lambda config: (
        "Mimetic initialisation (Trockman and Kolter, 2023) drew the projections of attention so that queries look at "
        "their own position and values are subtracted."
    ),
    learn=draw_mimetic,
    options={"query_key": 0.7, "value_output": 0.4, "positions": True, "control": False},
    check=_check,
)
"""Mimetic initialisation."""
