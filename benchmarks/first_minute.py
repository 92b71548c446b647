"""Where the first minute of the quickstart goes: imports, data, NIO, training.

python -m benchmarks.first_minute
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data.dataloader import _BaseDataLoaderIter

RESULT = Path(__file__).parent / "results" / "first-minute.json"
IMPORTS = (
    "pass",
    "import torch",
    "import torch, nio_hf",
    "from nio_hf import initialize",
    "from nio_hf import NIOTrainer",
)
ROUNDS = 3


def main() -> None:
    """Measure, print and write."""
    result: dict[str, Any] = {"imports": {code: _import_seconds(code) for code in IMPORTS}}
    result |= _run()
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    sys.stdout.write(RESULT.read_text())


def _import_seconds(code: str) -> float:
    """The fastest of a few fresh interpreters."""
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _run() -> dict[str, Any]:
    started = time.perf_counter()
    from nio_hf.hub.run_folder import versions
    from nio_hf.recipe.loading import load_recipe
    from nio_hf.tasks.image_classification import build_trainer

    imported = time.perf_counter()
    options = "--max_steps 100 --eval_strategy no --output_dir outputs/first-minute --disable_tqdm"
    trainer = build_trainer(load_recipe("vit-tiny/digits/nio", options.split()))
    built = time.perf_counter()
    with _waits() as nio_data:
        nio = trainer.run_nio()
    with _waits() as train_data:
        training = trainer.train().metrics["train_runtime"]
    search = sum(record.seconds for record in nio.history)
    return {
        "seconds": {
            "imports": imported - started,
            "data and model": built - imported,
            "NIO, search": search,
            "NIO, report batches and the rest": nio.seconds - search,
            "training, 100 steps": training,
        },
        "share of data": {"of NIO": sum(nio_data) / nio.seconds, "of training": sum(train_data) / training},
        "versions": versions(),
    }


@contextlib.contextmanager
def _waits() -> Iterator[list[float]]:
    """Seconds that each batch of any loader is waited for."""
    fetch = _BaseDataLoaderIter.__next__
    waits: list[float] = []

    def timed(batches: Any) -> Any:
        started = time.perf_counter()
        try:
            return fetch(batches)
        finally:
            waits.append(time.perf_counter() - started)

    _BaseDataLoaderIter.__next__ = timed  # type: ignore[method-assign]
    try:
        yield waits
    finally:
        _BaseDataLoaderIter.__next__ = fetch  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
