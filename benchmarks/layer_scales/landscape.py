"""Random configurations of group scales: what is measured at the start, and how the training ends.

python -m benchmarks.layer_scales.landscape ../shared/data vit --worker 0 --workers 2

One line of JSON for each configuration ("start") and each training ("training") is appended to
benchmarks/results/layer-scales/NAME-WORKER.jsonl; a run that was interrupted goes on. The plan is in README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.layer_scales.measures import measure
from benchmarks.layer_scales.trainings import SETUPS, Images, batches, build_model, load_images, scale_groups, train

RESULTS = Path(__file__).parent.parent / "results" / "layer-scales"
LEARNING_RATES = (1e-3, 2e-3)
CONFIGURATIONS = {"vit": 120, "swin": 120, "digits": 60}
SEEDS = 2
"""Configurations take turns: the even ones have seed 0, the odd ones seed 1."""
MEASURED_SAMPLES = 256
COMMON, NARROW, WIDE = 4.0, 8.0, 128.0
CHANGED = 0.25
"""Share of the groups that a sparse configuration changes."""
WINDOW = 10
"""Steps whose mean loss is kept."""
NAMED = {
    "vit": {
        **{f"x{factor:g}": (factor, {}) for factor in (1, 2, 2.8, 4, 5.6, 8)},
        **{f"x4 positions x{factor}": (4.0, {"positions": float(factor)}) for factor in (4, 8, 16, 32, 64)},
    },
    "swin": {f"x{factor:g}": (factor, {}) for factor in (1, 2, 2.8, 4, 5.6, 8)},
    "digits": {
        **{f"x{factor:g}": (factor, {}) for factor in (1, 2, 2.8, 4, 5.6, 8)},
        **{f"x4 positions x{factor}": (4.0, {"positions": float(factor)}) for factor in (8, 32)},
    },
}
"""{model: {name: (common factor, {group: further factor})}}, at both seeds."""


@dataclasses.dataclass(frozen=True)
class Configuration:
    """Scales of the groups of a model.

    Attributes:
        name: its number, or what it is.
        seed: of the weights and of the order of the data.
        common: factor of all groups.
        factors: {group: further factor}.
    """

    name: str
    seed: int
    common: float
    factors: dict[str, float]

    @property
    def scales(self) -> dict[str, float]:
        """{group: scale}."""
        return {group: self.common * factor for group, factor in self.factors.items()}


def configurations(name: str) -> list[Configuration]:
    """The named configurations of a model at each seed, and the random ones."""
    setup = SETUPS[name]
    ones = dict.fromkeys(setup.groups, 1.0)
    made = [
        Configuration(label, seed, common, ones | factors)
        for label, (common, factors) in NAMED[name].items()
        for seed in range(SEEDS)
    ]
    for number in range(CONFIGURATIONS[name]):
        draw = np.random.default_rng([sorted(SETUPS).index(name), number])
        common = math.exp(draw.uniform(0, math.log(COMMON)))
        sparse = number % 4 < 2
        spread = 1.0 if sparse else draw.uniform(0, 1)
        factors = {}
        for group in setup.groups:
            upper = WIDE if group in setup.wide else NARROW
            exponent = spread * draw.uniform(-math.log(NARROW), math.log(upper))
            changed = draw.uniform() < CHANGED or not sparse
            factors[group] = math.exp(exponent) if changed else 1.0
        made.append(Configuration(str(number), number % SEEDS, common, factors))
    return made


def carry_out(name: str, learning_rate: float, data: Path, worker: int, workers: int) -> None:
    """Measure the configurations of one worker, where that is not done, and train them at a learning rate."""
    setup = SETUPS[name]
    images = load_images(setup.data, data)
    target = RESULTS / f"{name}-{worker}.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["kind"], row["name"], row["seed"], row.get("learning_rate")) for row in read(name)}
    own = configurations(name)[worker::workers]
    with target.open("a", encoding="utf-8") as file:
        for configuration in tqdm(own, desc=f"{name}, {learning_rate:g}", mininterval=30):
            key = (configuration.name, configuration.seed)
            for kind, rate in (("start", None), ("training", learning_rate)):
                if (kind, *key, rate) in done:
                    continue
                row = (
                    _start(name, configuration, images)
                    if rate is None
                    else _training(name, configuration, images, rate)
                )
                line = {"kind": kind, "name": configuration.name, "seed": configuration.seed, **row}
                file.write(json.dumps(line) + "\n")
                file.flush()


def _start(name: str, configuration: Configuration, images: Images) -> dict[str, Any]:
    setup = SETUPS[name]
    model = build_model(name, configuration.seed)
    scale_groups(model, setup, configuration.scales)
    count = MEASURED_SAMPLES // setup.batch_size
    drawn = list(itertools.islice(batches(images, setup, configuration.seed, flip=False), count))
    pixels, labels = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    found = measure(model, setup, pixels, labels)
    return {
        "common": configuration.common,
        "factors": configuration.factors,
        "measures": {key: _short(value) for key, value in found.items()},
    }


def _training(name: str, configuration: Configuration, images: Images, learning_rate: float) -> dict[str, Any]:
    setup = SETUPS[name]
    model = build_model(name, configuration.seed)
    scale_groups(model, setup, configuration.scales)
    ended = train(model, setup, images, learning_rate=learning_rate, seed=configuration.seed)
    losses = ended.losses
    windows = [losses[start : start + WINDOW] for start in range(0, len(losses), WINDOW)]
    return {
        "learning_rate": learning_rate,
        "steps": len(losses),
        "losses": [_short(sum(window) / len(window)) for window in windows],
        "accuracy": _short(ended.accuracy),
        "test_loss": _short(ended.loss),
    }


def read(name: str) -> Iterator[dict[str, Any]]:
    """All lines that the workers have written."""
    for file in sorted(RESULTS.glob(f"{name}-*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def main() -> int:
    """Carry out the share of one worker; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with cifar10/{train,test}.parquet")
    parser.add_argument("names", nargs="+", choices=sorted(SETUPS), help="models, in this order")
    parser.add_argument("--worker", type=int, default=0, help="number of this worker, from 0")
    parser.add_argument("--workers", type=int, default=1, help="number of workers")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for learning_rate, name in itertools.product(LEARNING_RATES, asked.names):
        carry_out(name, learning_rate, asked.data, asked.worker, asked.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
