"""What a batch of NIO costs each of several processes: bytes summed, operations, memory.

python -m benchmarks.scaling
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.accounting import counted
from benchmarks.workloads import FIRST_PASS, Workload, workload
from nio_hf.core import Collective
from nio_hf.core.collective import SIGNALS
from nio_hf.hub.run_folder import versions

RESULT = Path(__file__).parent / "results" / "scaling-cpu.json"
MODEL = "vit-tiny-32"
BATCH_SIZE = 32
PROCESSES = (1, 2, 3, 4)
SUB_BATCHES = (2, 4, 8)
STEPS = {FIRST_PASS: 1, "exact": 4, "exact_kept": 3}
"""{way: training steps of arithmetic of a batch on one process}."""
BYTES = 4


def bytes_summed(path: str, gradient_numbers: int, scaled_tensors: int, sub_batches: int, processes: int) -> int:
    """The model: bytes of all tensors that a batch sums over the processes.

    The first pass sums u with P numbers, three numbers of each of the D sub-batches, and how it goes; the second one
    the gradient of m scales, and how it goes.
    """
    if processes == 1:
        return 0
    first = gradient_numbers + 3 * sub_batches + SIGNALS
    return BYTES * (first if path == FIRST_PASS else first + scaled_tensors + SIGNALS)


def share_of_work(sub_batches: int, processes: int) -> float:
    """The model: what the busiest process computes of a batch, ceil(D / processes) / D."""
    return -(-sub_batches // processes) / sub_batches


def samples_at_once(batch_size: int, sub_batches: int, processes: int, path: str) -> int:
    """The model: samples whose graph a process holds, one sub-batch or, where graphs are kept, all of its own.

    The peak is a few times P numbers, and what the graphs of so many samples hold.
    """
    own = -(-sub_batches // processes) if path == "exact_kept" else 1
    return own * -(-batch_size // sub_batches)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table of Markdown, measured numbers beside those of the models."""
    lines = [
        "| processes | D | path | MB summed | model | training steps, busiest | model | peak / P | samples held |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        processes, sub_batches, path = row["processes"], row["sub_batches"], row["path"]
        summed = bytes_summed(path, row["gradient_numbers"], row["scaled_tensors"], sub_batches, processes)
        steps = STEPS[path] * share_of_work(sub_batches, processes)
        lines.append(
            f"| {processes} | {sub_batches} | {path.replace('_', ' ')} | {row['bytes_summed'] / 1e6:.3f} "
            f"| {summed / 1e6:.3f} | {row['training_steps']:.2f} | {steps:.2f} "
            f"| {row['peak_bytes'] / row['parameter_bytes']:.1f} "
            f"| {samples_at_once(BATCH_SIZE, sub_batches, processes, path)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    rows = []
    for processes in PROCESSES:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_measure, (processes, folder), nprocs=processes)
            ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(processes)]
        rows += [_busiest(measured) for measured in zip(*ranks, strict=True)]
    result = {"model": MODEL, "batch_size": BATCH_SIZE, "device": "cpu", "versions": versions(), "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(table(rows) + "\n")


def _busiest(ranks: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One row of all ranks: the largest of what differs."""
    return {key: max(rank[key] for rank in ranks) for key in ranks[0]}


def _measure(rank: int, processes: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=processes)
    rows = []
    base = workload(MODEL, torch.device("cpu"), batch_size=BATCH_SIZE)
    base = dataclasses.replace(base, collective=Collective.current())
    step = counted(base.training_step(math_attention=True)).operations
    for path in STEPS:
        for sub_batches in SUB_BATCHES:
            work = dataclasses.replace(base, sub_batches=sub_batches)
            rows.append({"processes": processes, "sub_batches": sub_batches, "path": path, **_batch(work, path, step)})
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def _batch(work: Workload, path: str, step: int) -> dict[str, Any]:
    """What this process does for a batch; `step` is the number of operations of a training step."""
    with _recorded() as sent:
        counts = counted(work.iteration(path, host_read=True))
    return {
        "bytes_summed": sum(sent),
        "gradient_numbers": sum(parameter.numel() for parameter in work.tensors.gradient_parameters),
        "scaled_tensors": len(work.tensors.scaled),
        "training_steps": counts.operations / step,
        "peak_bytes": counts.peak,
        "parameter_bytes": work.parameter_bytes,
    }


@contextlib.contextmanager
def _recorded() -> Iterator[list[int]]:
    """The bytes of each sum over the processes."""
    original = dist.all_reduce
    sent: list[int] = []

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield sent
    finally:
        dist.all_reduce = original


if __name__ == "__main__":
    main()
