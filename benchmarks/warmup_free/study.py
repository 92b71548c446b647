"""The trainings of the study, part by part; what was interrupted goes on.

python -m benchmarks.warmup_free.study ../shared/data
python -m benchmarks.warmup_free.study ../shared/data rivals-vit --hours 2

Start it twice for two workers: each takes what no other one is at. One line of JSON for each training goes to
benchmarks/results/warmup-free/PART.jsonl. The plan of each part is in README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import filelock
import torch
from tqdm import tqdm

from benchmarks.warmup_free import search
from benchmarks.warmup_free.lab import ARMS, RESULTS, Row, Run, Task, carry_out, carry_out_scaled

LOCKS = Path("outputs") / "warmup-free"
CHOOSING = (0, 1)
"""Seeds to choose by, and of the direct search."""
JUDGING = tuple(range(1300, 1308))
LEAST_RATE, LARGEST_RATE = 6.25e-5, 3.2e-2
RETRY_SECONDS = 5.0

TASKS = {"vit": Task("vit"), "swin": Task("swin")}
_COMMON = ("x2", "x4", "width", "xavier", "mimetic", "lsuv")
_FIRST = ("nio", "class", "warmup10", "warmup30")
_LAST = (
    *("searched", "gi_adam", "radam", "schedule_free", "muon"),
    *("nio_warmup10", "nio_seeded", "nio_muon", "xavier_nio", "mimetic_nio"),
)
RIVALS = {
    "vit": (*_FIRST, *_COMMON, "structured", "positions8", "positions32", *_LAST),
    "swin": (*_FIRST, *_COMMON, *_LAST),
}
"""{task: arms}."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A training that is still to be done.

    Attributes:
        part: whose results it goes to.
        name: by which workers tell it from others.
        carry_out: (folder of the data) -> its line.
    """

    part: str
    name: str
    carry_out: Callable[[Path], Row]


def rows(part: str) -> list[Row]:
    """The lines of a part."""
    file = RESULTS / f"{part}.jsonl"
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def search_jobs(model: str) -> Iterator[Job]:
    """The trainings that the direct search needs next; what it has found is kept where it is through."""
    part, found = f"search-{model}", replayed(model)
    if found.missing is None:
        search.save(model, found.best)
        return
    done = {(_exponents(row), row["seed"]) for row in rows(part)}
    for seed in CHOOSING:
        if (found.missing, seed) not in done:
            exponents = found.missing

            def run(data: Path, seed: int = seed, exponents: search.Exponents = exponents) -> Row:
                return carry_out_scaled(TASKS[model], dict(exponents), search.RATES[model], seed, data)

            yield Job(part, f"{exponents} {seed}", run)


def replayed(model: str) -> search.Found:
    """The direct search, as far as its trainings have come."""
    accuracies: dict[search.Exponents, list[float]] = {}
    for row in rows(f"search-{model}"):
        accuracies.setdefault(_exponents(row), []).append(row["accuracy"])
    return search.replay(model, accuracies, len(CHOOSING))


def _exponents(row: Row) -> search.Exponents:
    return tuple(row["exponents"].items())


def rival_jobs(task: str, arms: Sequence[str], judging: Sequence[int] = JUDGING) -> Iterator[Job]:
    """The trainings that are missing: those that choose a learning rate, then those at the chosen one that judge."""
    part = f"rivals-{task}"
    lines = rows(part)
    done = {tuple(row[field.name] for field in dataclasses.fields(Run)) for row in lines}
    for stage, arm in itertools.product(("choosing", "judging"), arms):
        if ARMS[arm].searched and replayed(task).missing is not None:
            continue
        rates, chosen = grid(arm, lines)
        runs = [Run(task, arm, rate, seed, True) for rate in rates for seed in CHOOSING]
        if stage == "judging":
            runs = [] if chosen is None else [Run(task, arm, chosen, seed, False) for seed in judging]
        for run in runs:
            if dataclasses.astuple(run) not in done:
                yield Job(part, str(run), lambda data, run=run: carry_out(run, TASKS[task], data))


def grid(arm: str, lines: Sequence[Row]) -> tuple[list[float], float | None]:
    """The learning rates of an arm, and the chosen one; None while trainings are missing.

    It begins with those of the arm. While the best one is at an end, the next one, half or twice as high, is added.
    """
    found: dict[float, list[float]] = {}
    for row in lines:
        if row["arm"] == arm and row["choosing"]:
            found.setdefault(row["learning_rate"], []).append(row["accuracy"])
    rates = sorted(ARMS[arm].rates)
    while all(len(found.get(rate, ())) == len(CHOOSING) for rate in rates):
        best = max(rates, key=lambda rate: statistics.fmean(found[rate]))
        if best == rates[0] and best > LEAST_RATE:
            rates = [best / 2, *rates]
        elif best == rates[-1] and best < LARGEST_RATE:
            rates = [*rates, 2 * best]
        else:
            return rates, best
    return rates, None


PARTS: dict[str, Callable[[], Iterator[Job]]] = {
    "search-vit": lambda: search_jobs("vit"),
    "search-swin": lambda: search_jobs("swin"),
    "rivals-vit": lambda: rival_jobs("vit", RIVALS["vit"]),
    "rivals-swin": lambda: rival_jobs("swin", RIVALS["swin"]),
}
"""{name: what is still to be done}."""


def work(parts: Sequence[str], data: Path, until: float) -> None:
    """Carry out what no other worker is at, until nothing is left or the time is over."""
    LOCKS.mkdir(parents=True, exist_ok=True)
    with tqdm(desc="trainings", unit="run", mininterval=60) as progress:
        while time.monotonic() < until:
            jobs = [job for part in parts for job in PARTS[part]()]
            if not jobs:
                return
            if any(_taken(job, data) for job in jobs):
                progress.update()
            else:
                time.sleep(RETRY_SECONDS)


def _taken(job: Job, data: Path) -> bool:
    """Carry out a job and keep its line; False where another worker is at it or has done it."""
    name = hashlib.sha256(f"{job.part} {job.name}".encode()).hexdigest()[:16]
    lock = filelock.FileLock(LOCKS / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return False
    with lock:
        if job.name not in {other.name for other in PARTS[job.part]()}:
            return False
        line = json.dumps(job.carry_out(data)) + "\n"
        with filelock.FileLock(LOCKS / "results.lock"), (RESULTS / f"{job.part}.jsonl").open("a") as file:
            file.write(line)
        return True


def main() -> int:
    """Carry out parts; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with cifar10 and imagenette224")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all, in this order")
    parser.add_argument("--hours", type=float, default=1e6, help="no training begins after them")
    asked = parser.parse_args()
    unknown = [part for part in asked.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}. Choose from {', '.join(PARTS)}")
    torch.set_num_threads(1)
    work(asked.parts or list(PARTS), asked.data, time.monotonic() + 3600 * asked.hours)
    return 0


if __name__ == "__main__":
    sys.exit(main())
