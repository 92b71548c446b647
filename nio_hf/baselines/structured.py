"""Structured initialisation: each head of a vision Transformer starts as a shift of the grid of patches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from nio_hf.baselines.attention import attention_layers
from nio_hf.baselines.mimetic import check_square, set_value_output
from nio_hf.baselines.positions import PositionTable, position_tables
from nio_hf.core.config import is_number
from nio_hf.core.method import Check, Learned, Method, Options, Watch
from nio_hf.core.problem import ScalingProblem
from nio_hf.errors import ModelError, Problem

_CELLS = (4, 1, 5, 3, 7, 0, 2, 6, 8)
"""Cells of the 3 x 3 neighbourhood, row by row, in the order in which heads get them."""
_PEAK, _NOISE = 1000.0, 3.0
_DEVIATION = 0.6
_POSITIVE = ("logit_norm", "positions", "value_output")


def draw_structured(problem: ScalingProblem, options: Options, watch: Watch) -> Learned:
    """Draw queries and keys so that each head looks at one neighbour in the grid of patches.

        T = 1000 H where H is 1, 3 Z elsewhere       A = P^+ T (P^+)^T = U S V^T       W_q = (U S^(1/2))_k^T
                                                                                       W_k = (V S^(1/2))_k^T

    H (P, P) is the matrix that shifts the n x n grid of the P patches by the offset of the head, one of a 3 x 3
    neighbourhood (the order of the cells is 4, 1, 5, 3, 7, 0, 2, 6, 8, again and again). Z is truncated normal with
    standard deviation 0.6. P^+ (d, P) is the pseudo-inverse of rank k, the head size, of the positions after a
    LayerNorm without weights. W_q and W_k get the Frobenius norm `logit_norm` each. The position table is multiplied by
    `positions` afterwards. Values and outputs are those of mimetic initialisation. The constants are those of the
    source's commands, which differ from those of its text. No batch is used; the seed decides.

    Options:
        logit_norm: 7.
        positions: 18.
        value_output: 0.4.

    Raises:
        ModelError: A model without attention layers, or without one table of absolute positions of a square grid.

    Source: "Structured Initialization for Vision Transformers", NeurIPS 2025, arXiv 2505.19985.
    """
    generator = torch.Generator().manual_seed(problem.config.seed)
    table, side = _grid(problem)
    layers = attention_layers(problem.loss.model, problem.tensors)
    places = functional.layer_norm(table.values.cpu().double(), table.values.shape[-1:])
    for layer in layers:
        check_square(layer)
        size = layer.head_size
        inverse = _inverse(places, size)
        heads = zip(layer.queries.split(size), layer.keys.split(size), strict=True)
        for head, (queries, keys) in enumerate(heads):
            row, column = divmod(_CELLS[head % len(_CELLS)], 3)
            target = _target(shift(side, row - 1, column - 1), generator)
            left, values, right = torch.linalg.svd(inverse @ target @ inverse.T)
            for weight, vectors in ((queries, left), (keys, right.T)):
                drawn = (vectors * values.sqrt())[:, :size].T
                weight.copy_(options["logit_norm"] * drawn / drawn.norm())
        set_value_output(layer, options["value_output"], generator, control=False)
    table.whole.mul_(options["positions"])
    return Learned()


def shift(side: int, rows: int, columns: int) -> Tensor:
    """(n^2, n^2) H with H[p, q] = 1 where patch q is the one that lies `rows` below and `columns` right of patch p."""
    shifts = [torch.diag(torch.ones(side - abs(by), dtype=torch.float64), by) for by in (rows, columns)]
    return torch.kron(*shifts)


def _target(grid: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.empty(grid.shape, dtype=torch.float64)
    torch.nn.init.trunc_normal_(noise, 0, _DEVIATION, -2 * _DEVIATION, 2 * _DEVIATION, generator=generator)
    return torch.where(grid == 1, _PEAK, _NOISE * noise)


def _inverse(places: Tensor, rank: int) -> Tensor:
    """The pseudo-inverse (d, P) of the best approximation of that rank."""
    left, values, right = torch.linalg.svd(places, full_matrices=False)
    rank = min(rank, int((values > values[0] * 1e-12).sum()))
    inverse: Tensor = right[:rank].T @ torch.diag(1 / values[:rank]) @ left[:, :rank].T
    return inverse


def _grid(problem: ScalingProblem) -> tuple[PositionTable, int]:
    """The table of positions, and the side of the grid."""
    tables = position_tables(problem.loss.model, problem.tensors)
    side = tables[0].side if len(tables) == 1 else None
    if side is None:
        found = ", ".join(table.name for table in tables) or "none"
        fix = "Choose a vision Transformer with one table of absolute positions of a square grid"
        where = type(problem.loss.model).__name__
        raise ModelError(Problem(where, f"tables of absolute positions: {found}", fix))
    return tables[0], side


def _check(options: Options) -> list[Check]:
    fix = "Give a finite number above 0"
    return [(name, options[name], is_number(options[name]) and options[name] > 0, fix) for name in _POSITIVE]


STRUCTURED = Method(
    name="structured",
    title="structured initialisation",
    describe=lambda config: (
        "Structured initialisation (arXiv 2505.19985) drew queries and keys so that each head looks at one neighbour "
        "in the grid of patches."
    ),
    learn=draw_structured,
    options={"logit_norm": 7.0, "positions": 18.0, "value_output": 0.4},
    check=_check,
)
"""Structured initialisation."""
