"""What an iteration of NIO costs each of several processes: bytes summed, operations, memory.

python -m benchmarks.scaling
"""

from __future__ import annotations

import contextlib
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.accounting import Counts, counted
from benchmarks.workloads import Workload, mean_loss, workload
from nio_hf.core import Collective, IterationRecord, NIOConfig, initialize
from nio_hf.core.collective import SIGNALS
from nio_hf.core.config import CurvatureName
from nio_hf.training.checkpoints import versions

RESULT = Path(__file__).parent / "results" / "scaling-cpu.json"
MODEL = "vit-tiny-32"
BATCH_SIZE = 32
PROCESSES = (1, 2, 3, 4)
SUB_BATCHES = (2, 4, 8)
PATHS: tuple[CurvatureName, ...] = ("exact", "exact_kept")
STEPS = {"exact": 4, "exact_kept": 3}
"""Training steps of arithmetic of an iteration on one process."""
BYTES = 4


def bytes_summed(gradient_numbers: int, scaled_tensors: int, sub_batches: int, processes: int) -> int:
    """The model: bytes of all tensors that an iteration sums over the processes.

    u with P numbers, n_d and L_d of D sub-batches, the gradient of m scales, and three times how it goes.
    """
    if processes == 1:
        return 0
    return BYTES * (gradient_numbers + 2 * sub_batches + scaled_tensors + 3 * SIGNALS)


def share_of_work(sub_batches: int, processes: int) -> float:
    """The model: what the busiest process computes of an iteration, ceil(D / processes) / D."""
    return -(-sub_batches // processes) / sub_batches


def samples_at_once(batch_size: int, sub_batches: int, processes: int, path: str) -> int:
    """The model: samples whose graph a process holds, one sub-batch or, where graphs are kept, all of its own.

    The peak of an iteration is about 4 P numbers, and what the graphs of so many samples hold.
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
        summed = bytes_summed(row["gradient_numbers"], row["scaled_tensors"], sub_batches, processes)
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
    for path in PATHS:
        for sub_batches in SUB_BATCHES:
            work = workload(MODEL, torch.device("cpu"), batch_size=BATCH_SIZE, sub_batches=sub_batches)
            rows.append({"processes": processes, "sub_batches": sub_batches, "path": path, **_iteration(work, path)})
    Path(folder, f"{rank}.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def _iteration(work: Workload, path: CurvatureName) -> dict[str, Any]:
    """What this process does in the second of two iterations."""
    counts = Counts()
    sent: list[int] = []
    marks: list[int] = []

    def on_iteration(record: IterationRecord) -> None:
        marks.append(sum(sent))
        if record.iteration == 1:
            counts.__enter__()
        else:
            counts.__exit__(None, None, None)

    with sdpa_kernel(SDPBackend.MATH), _recorded(sent):
        result = initialize(
            work.model,
            [work.batch() for _ in range(3)],
            mean_loss,
            NIOConfig(iterations=2, sub_batches=work.sub_batches, holdout_batches=1, curvature=path),
            collective=Collective.current(),
            on_iteration=on_iteration,
        )
    return {
        "bytes_summed": marks[1] - marks[0],
        "gradient_numbers": sum(parameter.numel() for parameter in work.scales.gradient),
        "scaled_tensors": len(result.tensors),
        "training_steps": counts.operations / counted(work.training_step(math_attention=True)).operations,
        "peak_bytes": counts.peak,
        "parameter_bytes": work.parameter_bytes,
    }


@contextlib.contextmanager
def _recorded(sent: list[int]) -> Iterator[None]:
    """Write down the bytes of each sum over the processes."""
    original = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        yield
    finally:
        dist.all_reduce = original


if __name__ == "__main__":
    main()
