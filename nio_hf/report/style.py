"""The style of all plots: readable in print and by people with any form of colour blindness."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from nio_hf.errors import OutputError, Problem
from nio_hf.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which people with any form of colour blindness can tell apart.
ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
DARK, GREY = "#333333", "#999999"

_KIND_STYLES = {
    "input": (ORANGE, "s"),
    "additive": (VERMILLION, "D"),
    "trunk": (BLUE, "o"),
    "transition": (SKY, "v"),
    "head": (PURPLE, "P"),
    "norm": (GREEN, "^"),
    "bias": (GREY, "X"),
    "vector": (DARK, "d"),
}
"""{kind of tensors: colour and shape}, in the order of the legends."""
_GROUP_STYLES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (VERMILLION, "D"), (PURPLE, "P"), (SKY, "v"))
_MAX_BLOCK_LABELS = 30
ROUND_STEPS = (1, 2, 5, 10)
"""Distances of ticks."""
Target = Path | BinaryIO
"""PNG file, whose folder is created, or an open binary file."""

_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "font.size": 9,
    "grid.alpha": 0.6,
    "grid.color": "#DDDDDD",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markeredgewidth": 1.1,
    "savefig.dpi": 160,
}


@contextlib.contextmanager
def figure(target: Target, width: float, height: float) -> Iterator[Figure]:
    """Make a figure, and write it at the end of the context. No display and no global figure is used.

    Raises:
        MissingExtraError: A missing extra `report`.
        OutputError: A target that cannot be written.
    """
    require("report", "Plots")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        drawn = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn
        try:
            if isinstance(target, Path):
                target.parent.mkdir(parents=True, exist_ok=True)
            drawn.savefig(target, format="png")
        except OSError as error:
            raise OutputError(Problem(str(target), str(error), "Free space or choose another output_dir")) from error


def kind_order(kind: str) -> int:
    """Return the rank of a kind of tensors: from the input to the head, then those that are no weight matrices."""
    return list(_KIND_STYLES).index(kind)


def marker(color: str, shape: str, *, is_open: bool = False) -> dict[str, Any]:
    """Return the look of points without a line."""
    return {
        "linestyle": "none",
        "marker": shape,
        "markersize": 5,
        "markeredgecolor": color,
        "markerfacecolor": "white" if is_open else color,
    }


def kind_marker(kind: str) -> dict[str, Any]:
    """Return the look of a kind of tensors."""
    return marker(*_KIND_STYLES[kind])


def group_marker(position: int) -> dict[str, Any]:
    """Return the look of the group at a position, different for 12 groups."""
    turn, color = divmod(position, len(_GROUP_STYLES))
    return marker(_GROUP_STYLES[color][0], _GROUP_STYLES[(color + turn) % len(_GROUP_STYLES)][1])


def mark_blocks(axes: Axes, blocks: Sequence[int]) -> None:
    """Name the blocks on the x axis and shade every other one."""
    every = math.ceil(len(blocks) / _MAX_BLOCK_LABELS)
    axes.set_xticks(blocks[::every])
    axes.set_xlim(min(blocks) - 0.6, max(blocks) + 0.6)
    axes.grid(visible=False, axis="x")
    for block in blocks[1::2]:
        axes.axvspan(block - 0.5, block + 0.5, color="#F4F4F4", linewidth=0, zorder=0)
    axes.set_xlabel("block, by depth (0: before the first)")


def integer_ticks(axes: Axes) -> None:
    """Put whole numbers on the x axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=ROUND_STEPS))


def legend_below(figure: Figure, *panels: Axes, columns: int = 3) -> None:
    """Draw one legend under all panels, with each label once."""
    entries: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        entries |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in entries}
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
