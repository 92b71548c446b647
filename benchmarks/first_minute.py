"""Where the first minute of the quickstart goes: imports, data, NIO, training.

python -m benchmarks.first_minute
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    from nio_hf.recipe.loading import load_recipe
    from nio_hf.train import build_trainer
    from nio_hf.training.checkpoints import versions

    imported = time.perf_counter()
    options = "--max_steps 100 --eval_strategy no --nio_iterations 20 --output_dir outputs/first-minute --disable_tqdm"
    trainer = build_trainer(load_recipe("vit-tiny/digits/nio", options.split()))
    built = time.perf_counter()
    nio_data = _timed(trainer, "get_nio_dataloader")
    nio = trainer.run_nio()
    train_data = _timed(trainer, "get_train_dataloader")
    training = trainer.train().metrics["train_runtime"]
    iterations = sum(record.seconds for record in nio.history)
    return {
        "seconds": {
            "imports": imported - started,
            "data and model": built - imported,
            "NIO, 20 iterations": iterations,
            "NIO, held-out batches and the rest": nio.seconds - iterations,
            "training, 100 steps": training,
        },
        "share of data": {
            "of NIO": sum(nio_data) / nio.seconds,
            "of training": sum(train_data) / training,
        },
        "versions": versions(),
    }


def _timed(trainer: Any, method: str) -> list[float]:
    """Seconds that each batch of a loader is waited for."""
    make: Callable[[], Any] = getattr(trainer, method)
    waits: list[float] = []

    def timed_loader() -> Any:
        loader = make()
        iterate = type(loader).__iter__

        class Timed(type(loader)):  # type: ignore[misc]
            def __iter__(self) -> Iterator[Any]:
                batches = iterate(self)
                while True:
                    started = time.perf_counter()
                    try:
                        batch = next(batches)
                    except StopIteration:
                        return
                    waits.append(time.perf_counter() - started)
                    yield batch

        loader.__class__ = Timed
        return loader

    setattr(trainer, method, timed_loader)
    return waits


if __name__ == "__main__":
    main()
