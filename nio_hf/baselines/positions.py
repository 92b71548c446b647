"""Tables of positions, and the grid of patches that they are of."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from nio_hf.core.tensors import ModelTensors

_NAMES = ("position_embedding", "pos_embed", "wpe")
_TEMPERATURE = 10_000.0
_MOST_TOKENS = 2


@dataclasses.dataclass(frozen=True)
class PositionTable:
    """A table of absolute positions.

    Attributes:
        name: Name of the parameter.
        values: (P, d) the rows of the P patches, a view of the parameter; those of tokens before them are left out.
        side: N of an n x n grid with P = n^2; None where P is no square.
        whole: Parameter.
    """

    name: str
    values: Tensor
    side: int | None
    whole: Tensor


def position_tables(model: nn.Module, tensors: ModelTensors) -> list[PositionTable]:
    """The tables of absolute positions that are scaled, by their names: parameters (1, P, d) or (P, d).

    Positions are of a grid in models of images, which have a convolution. Up to two rows before those of a square grid
    are of tokens.
    """
    is_of_images = any(isinstance(module, nn.Conv2d) for module in model.modules())
    tables = []
    for place in tensors.scaled:
        is_named = any(name in place.name for name in _NAMES)
        rows = place.parameter.data
        if place.kind != "additive" or not is_named or rows.ndim not in (2, 3):
            continue
        rows = rows[0] if rows.ndim == 3 else rows
        count = next((n for n in range(_MOST_TOKENS + 1) if math.isqrt(len(rows) - n) ** 2 == len(rows) - n), None)
        side = None if count is None or not is_of_images else math.isqrt(len(rows) - count)
        tables.append(PositionTable(place.name, rows[count or 0 :], side, place.parameter.data))
    return tables


def sine_cosine(side: int, width: int) -> Tensor:
    """(side^2, width) sines and cosines of both coordinates of a grid, a quarter of the width each.

    Columns that a width which is no multiple of four has left are zero.
    """
    quarter = width // 4
    rates = _TEMPERATURE ** (-torch.arange(quarter, dtype=torch.float64) / max(quarter, 1))
    places = torch.arange(side, dtype=torch.float64)
    y, x = (axis.reshape(-1, 1) * rates for axis in torch.meshgrid(places, places, indexing="ij"))
    table = torch.zeros(side * side, width, dtype=torch.float64)
    table[:, : 4 * quarter] = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)
    return table
