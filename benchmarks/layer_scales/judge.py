"""NIO as it is shipped against its rivals, each at its best learning rate, on seeds that chose nothing.

python -m benchmarks.layer_scales.judge run ../shared/data vit swin imagenette digits --stage judging
python -m benchmarks.layer_scales.judge table

Trainings are those of trainings.py, with 500 steps from which an arm pays its initialisation (the digits: 300). What
the arms are, what chooses and what decides is in README.md, "Judgement". One line of JSON for each training goes to
benchmarks/results/layer-scales/judged-NAME-WORKER.jsonl; a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.layer_scales import landscape
from benchmarks.layer_scales.landscape import RESULTS
from benchmarks.layer_scales.trainings import (
    SETUPS,
    Images,
    Setup,
    batches,
    build_model,
    load_images,
    loss_of,
    scale_groups,
    train,
    without_test_images,
)
from nio_hf import NIOConfig, initialize
from nio_hf.trials.interval import Interval, corrected

LEARNING_RATES = (5e-4, 1e-3, 2e-3)
CHOOSING = range(3)
JUDGING = {
    "vit": range(1200, 1205),
    "swin": range(1100, 1105),
    "imagenette": range(1200, 1205),
    "digits": range(1200, 1220),
}
"""The seeds that judge. Those from 1100 on have judged an earlier rule; in the Swin both rules are the same."""
DIGITS_RATE, DIGITS_STEPS = 1e-3, 300
CONFIDENCE = 0.9
MOST_DEVIATIONS = 2.0
ARMS = {
    "vit": ("range4", "positions", "former", "nio"),
    "swin": ("range4", "former", "nio"),
    "imagenette": ("range4", "nio"),
    "digits": ("class", "nio"),
}
PAIRS = (
    ("vit", "range4"),
    ("vit", "positions"),
    ("vit", "former"),
    ("swin", "range4"),
    ("swin", "former"),
    ("imagenette", "range4"),
)
"""(model and data, arm that NIO is held against); all of them are corrected for together."""
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: of model and data.
        arm: its initialisation.
        learning_rate: peak.
        seed: of weights and order of the data.
        choosing: whether it chooses the learning rate, on images that are set aside from the training.
    """

    name: str
    arm: str
    learning_rate: float
    seed: int
    choosing: bool


def initialised(run: Run, setup: Setup, images: Images) -> tuple[nn.Module, Row]:
    """The model of a run as its arm makes it, with its cost in training steps and what it found."""
    model = build_model(run.name, run.seed)
    ones = dict.fromkeys(setup.groups, 1.0)
    match run.arm:
        case "class":
            return model, {"cost": 0.0}
        case "range4" | "positions":
            further = {"positions": 8.0} if run.arm == "positions" else {}
            scale_groups(model, setup, {group: 4.0 * further.get(group, 1.0) for group in ones})
            return model, {"cost": 0.0}
        case "former":
            found = json.loads((RESULTS / "former.json").read_text(encoding="utf-8"))[f"{run.name} {run.seed}"]
            scale_groups(model, setup, dict.fromkeys(ones, found["scale"]))
            return model, found
        case _:
            config = NIOConfig()
            count = config.report_batches + config.batches
            drawn = list(itertools.islice(batches(images, setup, run.seed, flip=setup.flip), count))
            result = initialize(model, drawn, lambda own, batch: loss_of(own, *batch), config)
            scales = {group.name: float(f"{group.omega:.5g}") for group in result.groups}
            return model, {"cost": result.cost, "scales": scales, "status": result.status}


def carry_out(run: Run, data: Path) -> Row:
    """The line of a run."""
    setup = SETUPS[run.name]
    if run.name == "digits":
        setup = dataclasses.replace(setup, steps=DIGITS_STEPS)
    images = load_images(setup.data, data)
    if run.choosing:
        images = without_test_images(images)
    model, found = initialised(run, setup, images)
    paid = dataclasses.replace(setup, steps=setup.steps - math.ceil(found["cost"]))
    ended = train(model, paid, images, learning_rate=run.learning_rate, seed=run.seed)
    return {
        **dataclasses.asdict(run),
        **found,
        "steps": paid.steps,
        "accuracy": round(ended.accuracy, 4),
        "loss": ended.loss,
    }


def planned(names: Sequence[str], stage: str) -> Iterator[Run]:
    """The runs that choose, or those that judge at what was chosen."""
    for name in names:
        for arm in ARMS[name]:
            if name == "digits":
                yield from (Run(name, arm, DIGITS_RATE, seed, False) for seed in JUDGING[name] if stage == "judging")
            elif stage == "choosing":
                yield from (Run(name, arm, rate, seed, True) for rate in LEARNING_RATES for seed in CHOOSING)
            else:
                yield from (Run(name, arm, chosen_rate(name, arm), seed, False) for seed in JUDGING[name])


def read(name: str) -> list[Row]:
    """All lines of a model and its data."""
    return list(landscape.read(f"judged-{name}"))


def chosen_rate(name: str, arm: str) -> float:
    """The learning rate with the best mean accuracy on the images that were set aside.

    Raises:
        ValueError: where runs that choose are missing.
    """
    found: dict[float, list[float]] = {rate: [] for rate in LEARNING_RATES}
    for row in read(name):
        if row["choosing"] and row["arm"] == arm:
            found[row["learning_rate"]].append(row["accuracy"])
    if any(len(accuracies) < len(CHOOSING) for accuracies in found.values()):
        raise ValueError(f"{name}, {arm}: the learning rate is not chosen yet")
    return max(found, key=lambda rate: statistics.fmean(found[rate]))


def run_all(names: Sequence[str], data: Path, stage: str, worker: int, workers: int) -> None:
    """Carry out the share of one worker, what is done already left out."""
    keys = [field.name for field in dataclasses.fields(Run)]
    done = {tuple(row[key] for key in keys) for name in names for row in read(name)}
    own = [run for run in planned(names, stage) if dataclasses.astuple(run) not in done][worker::workers]
    for run in tqdm(own, desc=stage, mininterval=30):
        target = RESULTS / f"judged-{run.name}-{worker}.jsonl"
        with target.open("a", encoding="utf-8") as file:
            file.write(json.dumps(carry_out(run, data)) + "\n")


def accuracies(name: str, arm: str) -> dict[int, float]:
    """{seed: accuracy} of the runs that judge."""
    return {row["seed"]: row["accuracy"] for row in judged(name, arm)}


def judged(name: str, arm: str) -> list[Row]:
    """The lines of the runs that judge."""
    return [row for row in read(name) if row["arm"] == arm and not row["choosing"] and row["seed"] in JUDGING[name]]


def table() -> str:
    """Accuracies of the arms, differences of NIO from them with Holm-corrected intervals, and the digits."""
    lines = ["| | arm | learning rate | cost, steps | accuracy, % |", "|---|---|---|---|---|"]
    for name, arm in [(name, arm) for name, arms in ARMS.items() for arm in arms]:
        rows = judged(name, arm)
        if rows:
            mean, spread = statistics.fmean(r["accuracy"] for r in rows), statistics.stdev(r["accuracy"] for r in rows)
            cost = statistics.fmean(row["cost"] for row in rows)
            lines.append(f"| {name} | {arm} | {rows[0]['learning_rate']:g} | {cost:.1f} | {mean:.1f} ± {spread:.1f} |")
    lines += ["", "| | NIO minus | difference | 90%, Holm-corrected | p |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {arm} | {found.mean:+.2f} | {found.low:+.2f} to {found.high:+.2f} | {found.p:.3f} |"
        for (name, arm), found in differences().items()
    ]
    nio, own = accuracies("digits", "nio"), accuracies("digits", "class")
    pairs = {seed: nio[seed] - own[seed] for seed in nio.keys() & own.keys()}
    if len(pairs) == len(JUDGING["digits"]):
        mean, deviation = statistics.fmean(pairs.values()), statistics.stdev(pairs.values())
        worse = sum(rise < -MOST_DEVIATIONS * deviation for rise in pairs.values())
        lines += [
            "",
            f"Digits: {mean:+.2f} ± {deviation:.2f} over {len(pairs)} seeds, worst {min(pairs.values()):+.2f};",
        ]
        lines[-1] += f" worse by more than {MOST_DEVIATIONS:g} deviations: {worse}."
    return "\n".join(lines)


def differences() -> dict[tuple[str, str], Interval]:
    """NIO against the arms of `PAIRS`."""
    samples = {}
    for name, arm in PAIRS:
        nio, other = accuracies(name, "nio"), accuracies(name, arm)
        samples[name, arm] = [nio[seed] - other[seed] for seed in JUDGING[name]]
    found = corrected(samples)
    return dict(sorted(found.items(), key=lambda pair: pair[1].p))


def main() -> int:
    """Run or print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("data", type=Path, help="folder with cifar10 and imagenette224")
    running.add_argument("names", nargs="+", choices=sorted(ARMS), help="models and data, in this order")
    running.add_argument("--stage", choices=("choosing", "judging"), required=True)
    running.add_argument("--worker", type=int, default=0, help="number of this worker, from 0")
    running.add_argument("--workers", type=int, default=1, help="number of workers")
    commands.add_parser("table")
    asked = parser.parse_args()
    if asked.command == "table":
        sys.stdout.write(table() + "\n")
        return 0
    torch.set_num_threads(1)
    run_all(asked.names, asked.data, asked.stage, asked.worker, asked.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
