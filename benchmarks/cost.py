"""What a batch of NIO costs against a training step of the same batch: arithmetic, memory, time.

    python -m benchmarks.cost                       all models; one JSON each, a table, a plot
    python -m benchmarks.cost --models vit-tiny-32 --sections seconds
    python -m benchmarks.cost --sections runs       whole runs with the defaults
    python -m benchmarks.cost --device cuda
    python -m benchmarks.cost --sections            the table and the plot of the results that are there

Operations and bytes are counted on tensors without data, by shapes alone, at any size, under the math attention kernel
on every side. They are held against the CPU allocator's own events of a real run once (`accounting_check`). Operations
of a whole run are counted on real tensors, since they depend on what the run finds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.accounting import Counts, allocator_bytes, counted, cuda_bytes, median_seconds
from benchmarks.cost_report import (
    markdown_errors,
    markdown_seconds,
    markdown_table,
    print_claims,
    print_runs,
    print_tables,
    save_plot,
)
from benchmarks.workloads import MODELS, STUDY_MODELS, WAYS, Workload, workload
from nio_hf.core import NIOConfig
from nio_hf.core.memory import is_out_of_memory
from nio_hf.hub.run_folder import versions

RESULTS = Path(__file__).parent / "results"
OF_A_MODEL = ("counts", "seconds", "errors")
"""Sections of the results of a model."""
RUNS = "runs"
"""The section of whole runs, and the file of its results."""
SUB_BATCHES = (2, 4, 8, 16)
OVERLAPS = (0.0, 0.2)
BATCH_SIZE = 64
SAMPLE_WISE = 10
"""Samples of the sample-wise GradCosine."""
CPU_SECONDS = {"vit-tiny-32": (64, (4, 8)), "vit-small-224": (8, (2, 4)), "swin-tiny-224": (8, (2, 4))}
"""{model: (B, the D)} of the wall times on the CPU."""
ROUNDS = 5


def main() -> int:
    """Measure what is asked for, then show what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--sections", nargs="*", choices=(*OF_A_MODEL, RUNS), default=(*OF_A_MODEL, RUNS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=WAYS, help="whose wall time is measured")
    options = parser.parse_args()
    folder = RESULTS / f"cost-{options.device}"
    sections = [section for section in OF_A_MODEL if section in options.sections]
    for model in options.models if sections else ():
        _measure(model, sections, options, folder / f"{model}.json")
    if RUNS in options.sections:
        _measure_runs(torch.device(options.device), folder / f"{RUNS}.json")
    files = [folder / f"{model}.json" for model in sorted(MODELS)]
    results = [json.loads(path.read_text()) for path in files if path.is_file()]
    if not results:
        sys.stderr.write(f"No results in {folder}.\n")
        return 1
    runs = folder / f"{RUNS}.json"
    counted_runs = json.loads(runs.read_text())["runs"] if runs.is_file() else []
    print_tables(results)
    print_runs(counted_runs)
    print_claims(results, counted_runs)
    if all(set(OF_A_MODEL) <= result.keys() for result in results):
        for table in (markdown_table(results), markdown_seconds(results), markdown_errors(results)):
            sys.stdout.write(f"{table}\n\n")
    save_plot(results, folder / "cost.png")
    return 0


def _measure(model: str, sections: Sequence[str], options: argparse.Namespace, path: Path) -> None:
    """Measure the sections of a model and write them beside those that the file has."""
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    device = torch.device(options.device)
    result |= {"model": model, "device": options.device, "seed": 0, "machine": _machine(device), "versions": versions()}
    measures = {
        "counts": lambda: list(_counts(model)),
        "seconds": lambda: list(_seconds(model, device, options.rounds, options.ways)),
        "errors": lambda: _errors(model, device),
    }
    for section in sections:
        result[section] = measures[section]()
        _write(result, path)


def _measure_runs(device: torch.device, path: Path) -> None:
    """Count whole runs with the defaults, and write them."""
    runs = [count_run(name, device) for name in tqdm(STUDY_MODELS, desc="runs", unit="run")]
    _write({"seed": 0, "machine": _machine(device), "versions": versions(), "runs": runs}, path)


def count_run(name: str, device: torch.device) -> dict[str, Any]:
    """Operations of a whole run with the defaults, in training steps, beside what its result reports."""
    work = workload(name, device, batch_size=BATCH_SIZE)
    step = counted(work.training_step(math_attention=True)).operations
    with Counts() as counts:
        result = work.run(NIOConfig())
    return {
        "model": name,
        "batch_size": work.batch_size,
        "counted_steps": counts.operations / step,
        "reported_steps": result.cost,
        "iterations": len(result.history),
        "scale": result.groups[0].omega,
    }


def _write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def _counts(name: str) -> Iterator[dict[str, Any]]:
    """Operations and bytes of each way at each D and r, with what they are held against."""
    base = workload(name, torch.device("meta"), batch_size=BATCH_SIZE)
    step = counted(base.training_step(math_attention=True))
    cells = [(r, d) for r in OVERLAPS for d in SUB_BATCHES]
    for overlap, sub_batches in tqdm(cells, desc=f"{name}: counts", unit="cell"):
        cell = dataclasses.replace(base, sub_batches=sub_batches, overlap=overlap)
        sizes = [len(window) for window in cell.windows]
        row: dict[str, Any] = {"batch_size": BATCH_SIZE, "sub_batches": sub_batches, "overlap": overlap}
        row |= {"samples": sum(sizes), "parameter_bytes": cell.parameter_bytes}
        row |= {"step_operations": step.operations, "step_bytes": step.peak}
        row["sub_batch_step_bytes"] = counted(cell.training_step(math_attention=True, samples=max(sizes))).peak
        row["micro_batch_graph_bytes"] = counted(cell.double_graph(-(-max(sizes) // 2))).peak
        for way in WAYS:
            counts = counted(cell.iteration(way, host_read=False))
            row[way] = {"operations": counts.operations, "bytes": counts.peak}
        yield row
    one = dataclasses.replace(base, batch_size=SAMPLE_WISE)
    step = counted(one.training_step(math_attention=True))
    loop = counted(one.sample_wise()).operations
    yield {"sample_wise": {"batch_size": one.batch_size, "step": step.operations, "loop": loop}}


def _seconds(name: str, device: torch.device, rounds: int, ways: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Median wall times, interleaved; on CUDA the whole grid, and the peak of the allocator with it."""
    size, all_sub_batches = CPU_SECONDS[name] if device.type == "cpu" else (BATCH_SIZE, SUB_BATCHES)
    base = workload(name, device, batch_size=size)
    for sub_batches in tqdm(all_sub_batches, desc=f"{name}: seconds", unit="cell"):
        cell = dataclasses.replace(base, sub_batches=sub_batches)
        works: dict[str, Any] = {"step": cell.training_step(math_attention=False)}
        works |= {way: cell.iteration(way, host_read=True) for way in ways}
        fitting = {way: work for way, work in works.items() if _fits(work)}
        row: dict[str, Any] = {"batch_size": size, "sub_batches": sub_batches, "rounds": rounds}
        row["seconds"] = median_seconds(fitting, rounds, device)
        row["does_not_fit"] = sorted(works.keys() - fitting.keys())
        if device.type == "cuda":
            row["bytes"] = {way: cuda_bytes(work) for way, work in fitting.items()}
        yield row
    one = dataclasses.replace(base, batch_size=min(size, 16))
    works = {"step": one.training_step(math_attention=False), "loop": one.sample_wise()}
    fitting = {way: work for way, work in works.items() if _fits(work)}
    yield {"sample_wise": {"batch_size": one.batch_size, "seconds": median_seconds(fitting, rounds, device)}}


def _fits(work: Any) -> bool:
    try:
        work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _errors(name: str, device: torch.device) -> dict[str, Any]:
    """Relative error of the scale gradient of approximate paths, and the accounting against the allocator's events."""
    cell = workload(name, device, batch_size=4)
    exact = cell.scale_gradient("exact")
    approximate = {
        "finite_difference": cell.scale_gradient("finite_difference"),
        "exact_bf16": cell.scale_gradient("exact", torch.bfloat16),
    }
    errors: dict[str, Any] = {way: float((g - exact).norm() / exact.norm()) for way, g in approximate.items()}
    if device.type == "cpu":
        errors["accounting_check"] = _accounting_check(name, cell)
    return errors


def _accounting_check(name: str, real: Workload) -> dict[str, Any]:
    """Peak of one exact iteration: counted without data, counted on real tensors, and by the allocator."""
    shapes = workload(name, torch.device("meta"), batch_size=real.batch_size)
    return {
        "batch_size": real.batch_size,
        "sub_batches": real.sub_batches,
        "without_data": counted(shapes.iteration("exact", host_read=False)).peak,
        "real_tensors": counted(real.iteration("exact", host_read=False)).peak,
        "allocator": allocator_bytes(real.iteration("exact", host_read=False)),
    }


def _machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "cpus": os.cpu_count(), "system": platform.system()}


if __name__ == "__main__":
    sys.exit(main())
