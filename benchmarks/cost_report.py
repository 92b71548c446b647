"""Tables, claims and plot of the cost of NIO, from the results that are there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.workloads import FIRST_PASS, JOINT, PATHS, WAYS

ARITHMETIC_BOUNDS = {
    "first_pass": 1.01,
    "exact": 4.05,
    "exact_kept": 3.05,
    "finite_difference": 4.05,
    "finite_difference_kept": 3.05,
    "exact_micro": 5.05,
}
"""Training steps of arithmetic of one batch at overlap 0, for any D."""
RUN_BOUND = 1.01
"""Counted over reported training steps of a whole run, or the inverse of it."""
JOINT_MEMORY_BOUNDS = {"exact": 0.40, "exact_kept": 0.65}
SECONDS_BOUNDS = {4: 0.60, 8: 0.35}
"""{D: wall time of `TIMED` as a share of the joint graph's}."""
TIMED = "exact_kept"
"""The path whose wall time is claimed: what the curvature "auto" chooses where the graphs fit."""
_LABELS = {FIRST_PASS: "first pass alone, a report batch", JOINT: "joint graph, as published"}
_MIB = 2**20
_COLOURS = dict(zip(WAYS, ["#000000", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#D55E00"], strict=True))


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something that the documents say, with what was measured.

    Attributes:
        model: it was measured on.
        text: what is said.
        measured: the number.
        bound: it must not exceed.
    """

    model: str
    text: str
    measured: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the number keeps to the bound."""
        return self.measured <= self.bound


def claims(results: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]] = ()) -> list[Claim]:
    """All claims that the results can tell of.

    Args:
        results: of the models.
        runs: whole runs.
    """
    found: list[Claim] = []
    for result in results:
        for row in _rows(result, "counts"):
            found += [Claim(result["model"], *claim) for claim in _count_claims(row)]
        for row in _rows(result, "seconds"):
            bound = SECONDS_BOUNDS.get(row["sub_batches"])
            seconds = row["seconds"]
            if bound is not None and {TIMED, JOINT} <= seconds.keys():
                text = f"wall time of {TIMED} / joint graph, D = {row['sub_batches']}, B = {row['batch_size']}"
                found.append(Claim(result["model"], text, seconds[TIMED] / seconds[JOINT], bound))
    for run in runs:
        ratio = run["counted_steps"] / run["reported_steps"]
        text = f"cost of a default run, counted and reported, the larger / the smaller, B = {run['batch_size']}"
        found.append(Claim(run["model"], text, max(ratio, 1 / ratio), RUN_BOUND))
    return found


def _count_claims(row: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    sub_batches, overlap = row["sub_batches"], row["overlap"]
    where = f"D = {sub_batches}, r = {overlap}"
    for path, bound in ARITHMETIC_BOUNDS.items():
        text = f"arithmetic of {path} / training step, {where}"
        yield text, row[path]["operations"] / row["step_operations"], bound * row["samples"] / row["batch_size"]
    if (sub_batches, overlap) != (4, 0.0):
        return
    for path, bound in JOINT_MEMORY_BOUNDS.items():
        yield f"peak memory of {path} / joint graph, {where}", row[path]["bytes"] / row[JOINT]["bytes"], bound
    parameters = row["parameter_bytes"]
    allowed = 1.3 * row["sub_batch_step_bytes"] + 4 * parameters
    bounds = {
        FIRST_PASS: ("training step of a sub-batch + 2 P", row["sub_batch_step_bytes"] + 2 * parameters),
        "finite_difference": ("1.3 x training step of a sub-batch + 4 P", allowed),
        "finite_difference_kept": ("the same + D P", allowed + sub_batches * parameters),
        "exact_micro": ("one micro-batch's double graph + 4 P", row["micro_batch_graph_bytes"] + 4 * parameters),
    }
    for path, (text, bytes_allowed) in bounds.items():
        yield f"peak memory of {path} / ({text}), {where}", row[path]["bytes"] / bytes_allowed, 1.0


def print_claims(results: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]] = ()) -> None:
    """Print every claim with its number, and say which do not hold."""
    table = Table(title="Claims", title_justify="left")
    for name in ("model", "claim", "measured", "bound", ""):
        table.add_column(name, justify="right" if name in ("measured", "bound") else "left")
    for claim in claims(results, runs):
        verdict = "holds" if claim.holds else "[bold red]DOES NOT HOLD[/]"
        table.add_row(claim.model, claim.text, f"{claim.measured:.3f}", f"{claim.bound:.3f}", verdict)
    _console().print(table)


def print_tables(results: Sequence[dict[str, Any]]) -> None:
    """Print arithmetic, memory and wall time of each path."""
    for result in results:
        counts, seconds = _rows(result, "counts"), _rows(result, "seconds")
        if counts:
            _console().print(_table(f"{result['model']}: training steps of arithmetic", counts, _steps))
            _console().print(_table(f"{result['model']}: peak memory, MiB", counts, _mebibytes))
        if seconds:
            _console().print(_table(f"{result['model']}: wall time / training step", seconds, _relative_seconds))
        for name, value in (*_sample_wise(result), *result.get("errors", {}).items()):
            _console().print(f"{result['model']}: {name} {value}", highlight=False)


def print_runs(runs: Sequence[dict[str, Any]]) -> None:
    """Print what whole runs with the defaults cost."""
    for run in runs:
        found = f"{run['iterations']} iterations, scale {run['scale']:.3g}"
        cost = f"{run['counted_steps']:.2f} training steps counted, {run['reported_steps']:.2f} reported"
        text = f"{run['model']}: a run with the defaults, B = {run['batch_size']}: {found}, {cost}"
        _console().print(text, highlight=False)


def _table(title: str, rows: Sequence[dict[str, Any]], value: Any) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("D, r (B)")
    for way in WAYS:
        table.add_column(way, justify="right")
    for row in rows:
        place = f"{row['sub_batches']}, {row.get('overlap', 0.0):g} ({row['batch_size']})"
        table.add_row(place, *(value(row, way) for way in WAYS))
    return table


def _steps(row: dict[str, Any], way: str) -> str:
    return f"{row[way]['operations'] / row['step_operations']:.2f}"


def _mebibytes(row: dict[str, Any], way: str) -> str:
    return f"{row[way]['bytes'] / _MIB:,.0f}"


def _relative_seconds(row: dict[str, Any], way: str) -> str:
    if way not in row["seconds"]:
        return "does not fit" if way in row["does_not_fit"] else "not measured"
    return f"{row['seconds'][way] / row['seconds']['step']:.2f}"


def markdown_table(results: Sequence[dict[str, Any]]) -> str:
    """The table of the README: arithmetic at overlap 0, the largest over D and models, and memory at D = 4."""
    rows = {
        result["model"]: {row["sub_batches"]: row for row in _rows(result, "counts") if row["overlap"] == 0}
        for result in results
    }
    lines = [
        "| way | arithmetic, any D | " + " | ".join(f"memory, {model}" for model in rows) + " |",
        "|---|---|" + "---|" * len(rows),
    ]
    for way in (JOINT, *PATHS, FIRST_PASS):
        steps = max(
            row[way]["operations"] / row["step_operations"] for cells in rows.values() for row in cells.values()
        )
        arithmetic = "1 + 2 D" if way == JOINT else f"{steps:.2f}"
        shares = [cells[4][way]["bytes"] / cells[4][JOINT]["bytes"] for cells in rows.values()]
        lines.append(f"| {_label(way)} | {arithmetic} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")
    return "\n".join(lines)


def markdown_seconds(results: Sequence[dict[str, Any]]) -> str:
    """The table of the README: wall time of `TIMED`."""
    timed = _label(TIMED)
    lines = [f"| model | B | D | {timed} / joint graph | {timed} / training step |", "|---|---|---|---|---|"]
    for result in results:
        for row in _rows(result, "seconds"):
            seconds = row["seconds"]
            shares = [f"{seconds[TIMED] / seconds[way]:.2f}" for way in (JOINT, "step") if way in seconds]
            place = f"{result['model']} | {row['batch_size']} | {row['sub_batches']}"
            lines.append(f"| {place} | {' | '.join(shares)} |")
    return "\n".join(lines)


def markdown_errors(results: Sequence[dict[str, Any]]) -> str:
    """The table of the README: error of the scale gradient of what is approximate."""
    lines = ["| model | finite difference, fp32 | exact, bfloat16 autocast |", "|---|---|---|"]
    for result in results:
        errors = result["errors"]
        lines.append(f"| {result['model']} | {errors['finite_difference']:.1e} | {errors['exact_bf16']:.1e} |")
    return "\n".join(lines)


def save_plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw arithmetic by D, and peak memory at D = 4, for each model."""
    from matplotlib.figure import Figure

    counted = [result for result in results if _rows(result, "counts")]
    if not counted:
        return
    figure = Figure(figsize=(4.6 * len(counted), 7.2), layout="constrained")
    panels = figure.subplots(2, len(counted), squeeze=False)
    for (arithmetic, memory), result in zip(panels.T, counted, strict=True):
        rows = [row for row in _rows(result, "counts") if row["overlap"] == 0]
        for way in WAYS:
            steps = [row[way]["operations"] / row["step_operations"] for row in rows]
            sub_batches = [row["sub_batches"] for row in rows]
            # Exact and finite differences cost the same: the wide line shows beside the narrow one upon it.
            style = {"linewidth": 5, "alpha": 0.5} if way.startswith("exact") else {"linewidth": 1.5}
            arithmetic.plot(sub_batches, steps, color=_COLOURS[way], label=_label(way), marker="o", **style)
        arithmetic.set_title(result["model"], loc="left")
        arithmetic.set_xscale("log", base=2)
        arithmetic.set_xticks([row["sub_batches"] for row in rows], [str(row["sub_batches"]) for row in rows])
        arithmetic.set_yscale("log", base=2)
        arithmetic.set_yticks([1 / 3, 1, 3, 4, 5, 9, 17, 33], ["1/3", "1", "3", "4", "5", "9", "17", "33"])
        arithmetic.minorticks_off()
        arithmetic.set_xlabel("sub-batches D")
        arithmetic.set_ylabel("training steps of arithmetic")
        row = next(row for row in rows if row["sub_batches"] == 4)
        sizes = [row[way]["bytes"] / 2**30 for way in WAYS]
        bars = memory.barh([_label(way) for way in WAYS], sizes, color=[_COLOURS[way] for way in WAYS])
        memory.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        memory.invert_yaxis()
        memory.set_xlim(0, 1.15 * max(sizes))
        memory.set_xlabel(f"peak memory (GiB), B = {row['batch_size']}, D = 4")
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    for panel in panels[1, 1:]:
        panel.set_yticklabels([])
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("One batch of NIO against a training step of the same batch (overlap 0)", x=0.01, ha="left")
    figure.savefig(path, dpi=130)


def _label(way: str) -> str:
    return _LABELS.get(way, way.replace("_", " "))


def _rows(result: dict[str, Any], section: str) -> list[dict[str, Any]]:
    return [row for row in result.get(section, []) if "sample_wise" not in row]


def _sample_wise(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Sample-wise GradCosine against a training step of the same samples."""
    for section, unit in (("counts", "operations"), ("seconds", "seconds")):
        for row in (row["sample_wise"] for row in result.get(section, []) if "sample_wise" in row):
            values = row["seconds"] if section == "seconds" else row
            share = values["loop"] / values["step"]
            yield f"sample-wise GradCosine, {unit}:", f"{share:.2f} of a training step of B = {row['batch_size']}"


def _console() -> Console:
    return Console(width=180)
