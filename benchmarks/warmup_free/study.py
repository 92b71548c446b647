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
from typing import Any

import filelock
import torch
from tqdm import tqdm

from benchmarks.warmup_free import search
from benchmarks.warmup_free.images import ImageTask
from benchmarks.warmup_free.lab import ARMS, RESULTS, Row, Run, Task, carry_out, carry_out_scaled, score
from benchmarks.warmup_free.texts import TextTask

LOCKS = Path("outputs") / "warmup-free"
CHOOSING = (0, 1)
"""Seeds to choose by, and of the direct search."""
JUDGING = (1300, 1301, 1302, 1303, 1304)
JUDGING_ELSEWHERE = (1400, 1401, 1402, 1403, 1404)
JUDGING_TEXT = (1500, 1501, 1502, 1503, 1504)
LEAST_RATE, LARGEST_RATE = 6.25e-5, 3.2e-2
RETRY_SECONDS = 5.0

_VIT = (
    *("nio", "class", "warmup10", "warmup30", "x2", "x4", "width", "xavier", "mimetic", "lsuv", "structured"),
    *("positions8", "positions32", "searched", "gi_adam", "radam", "schedule_free", "muon"),
    *("nio_warmup10", "nio_seeded", "nio_muon", "xavier_nio", "mimetic_nio"),
)
_SWIN = ("nio", "class", "warmup10", "warmup30", "x4", "xavier", "mimetic", "searched", "gi_adam", "nio_seeded")
_LONG = ("nio", "warmup10", "x4")
_TEXT = ("nio", "class", "warmup10", "warmup30", "x2")
_MORE_TEXT = (*_TEXT, "width", "gi_adam", "nio_seeded")


@dataclasses.dataclass(frozen=True)
class Part:
    """Trainings of one task that are held against each other.

    Attributes:
        task: Training that the arms share.
        arms: Names of the arms.
        judging: Seeds that judge.
        choosing: Seeds that choose a learning rate.
        rates_of: Part whose learning rates hold; None for a choice of its own.
        extends: Whether learning rates are added while the best is at an end.
    """

    task: Task
    arms: tuple[str, ...]
    judging: tuple[int, ...]
    choosing: tuple[int, ...] = CHOOSING
    rates_of: str | None = None
    extends: bool = True


def _where(**changes: Any) -> Part:
    return Part(ImageTask("vit", **changes), _LONG, JUDGING_ELSEWHERE, choosing=(0,), extends=False)


def _text(model: str, arms: tuple[str, ...]) -> Part:
    return Part(TextTask(model), arms, JUDGING_TEXT, choosing=(0,))


def _long_text(model: str) -> Part:
    return Part(TextTask(model, steps=5000), ("nio", "warmup10"), JUDGING_TEXT[:3], rates_of=f"text-{model}")


HELD = {
    "rivals-vit": Part(ImageTask("vit"), _VIT, JUDGING),
    "text-gpt2": _text("gpt2", (*_MORE_TEXT, "warmup2", "warmup5", "nio_half")),
    "length-2500": Part(ImageTask("vit", steps=2500), _LONG, JUDGING_ELSEWHERE, choosing=(0,)),
    "text-bert": _text("bert", _TEXT),
    "text-llama": _text("llama", (*_MORE_TEXT, "residual")),
    "text-gpt2-5000": _long_text("gpt2"),
    "text-llama-5000": _long_text("llama"),
    "text-bert-5000": Part(
        TextTask("bert", steps=5000), ("nio", "class", "warmup10", "x2"), JUDGING_TEXT[:3], choosing=(0,)
    ),
    "rivals-swin": Part(ImageTask("swin"), _SWIN, JUDGING, choosing=(0,)),
    "where-width192": _where(width=192),
    "where-depth12": _where(depth=12),
    "where-imagenette64": _where(data="imagenette224", pixels=64),
    "length-10000": Part(
        ImageTask("vit", steps=10_000, augmented=True),
        ("nio", "warmup10", "published"),
        JUDGING_ELSEWHERE[:3],
        rates_of="length-2500",
    ),
}
"""{name of a part: what is held against each other}, in the order of the work."""
SEARCHED_BY = {"search-vit": "rivals-vit", "search-swin": "rivals-swin"}
"""{name of a direct search: the part that has its arm}."""


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


def search_jobs(part: str) -> Iterator[Job]:
    """The trainings that a direct search needs next; what it has found is kept where it is through."""
    task = HELD[SEARCHED_BY[part]].task
    found = replayed(part)
    if found.missing is None:
        with filelock.FileLock(LOCKS / "results.lock"):
            search.save(task.model, found.best)
        return
    done = {(_exponents(row), row["seed"]) for row in rows(part)}
    for seed in CHOOSING:
        if (found.missing, seed) not in done:
            exponents = found.missing

            def run(data: Path, seed: int = seed, exponents: search.Exponents = exponents) -> Row:
                return carry_out_scaled(task, dict(exponents), search.RATES[task.model], seed, data)

            yield Job(part, f"{exponents} {seed}", run)


def replayed(part: str) -> search.Found:
    """A direct search, as far as its trainings have come."""
    accuracies: dict[search.Exponents, list[float]] = {}
    for row in rows(part):
        accuracies.setdefault(_exponents(row), []).append(row["accuracy"])
    return search.replay(HELD[SEARCHED_BY[part]].task.model, accuracies, len(CHOOSING))


def _exponents(row: Row) -> search.Exponents:
    return tuple(row["exponents"].items())


def held_jobs(name: str) -> Iterator[Job]:
    """The trainings that are missing: those that choose a learning rate, then those at the chosen one that judge."""
    part, lines = HELD[name], rows(name)
    done = {tuple(row[field.name] for field in dataclasses.fields(Run)) for row in lines}
    for stage, arm in itertools.product(("choosing", "judging"), part.arms):
        if ARMS[arm].searched and any(replayed(own).missing for own, of in SEARCHED_BY.items() if of == name):
            continue
        rates, chosen = grid(name, arm, lines)
        runs = [Run(name, arm, rate, seed, True) for rate in rates for seed in part.choosing]
        if stage == "judging":
            runs = [] if chosen is None else [Run(name, arm, chosen, seed, False) for seed in part.judging]
        for run in runs:
            if dataclasses.astuple(run) not in done:
                yield Job(name, str(run), lambda data, run=run: carry_out(run, part.task, data))


def grid(name: str, arm: str, lines: Sequence[Row]) -> tuple[list[float], float | None]:
    """The learning rates that an arm is tried at in a part, and the chosen one; None while trainings are missing.

    It begins with those of the arm. While the best one is at an end, the next one, half or twice as high, is added,
    where the part says so. A part that has the learning rates of another one tries none; an arm that is not in that one
    has the rate of NIO.

    Args:
        name: of the part.
        arm: its name.
        lines: of the part.
    """
    part = HELD[name]
    if part.rates_of is not None:
        known = arm if arm in HELD[part.rates_of].arms else "nio"
        return [], grid(part.rates_of, known, rows(part.rates_of))[1]
    found: dict[float, dict[int, float]] = {}
    for row in lines:
        if row["arm"] == arm and row["choosing"]:
            found.setdefault(row["learning_rate"], {})[row["seed"]] = score(row)
    rates = sorted(ARMS[arm].rates)
    while all(len(found.get(rate, ())) == len(part.choosing) for rate in rates):
        best = max(rates, key=lambda rate: statistics.fmean(found[rate].values()))
        if part.extends and best == rates[0] and best > LEAST_RATE:
            rates = [best / 2, *rates]
        elif part.extends and best == rates[-1] and best < LARGEST_RATE:
            rates = [*rates, 2 * best]
        else:
            return rates, best
    return rates, None


def jobs_of(part: str) -> Iterator[Job]:
    """What is still to be done of a part."""
    return search_jobs(part) if part in SEARCHED_BY else held_jobs(part)


PARTS = (*SEARCHED_BY, *HELD)


def work(parts: Sequence[str], data: Path, until: float) -> None:
    """Carry out what no other worker is at, until nothing is left or the time is over."""
    LOCKS.mkdir(parents=True, exist_ok=True)
    with tqdm(desc="trainings", unit="run", mininterval=60) as progress:
        while time.monotonic() < until:
            jobs = [job for part in parts for job in jobs_of(part)]
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
        if job.name not in {other.name for other in jobs_of(job.part)}:
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
    work(asked.parts or PARTS, asked.data, time.monotonic() + 3600 * asked.hours)
    return 0


if __name__ == "__main__":
    sys.exit(main())
