"""Recipes on real images, shortened: NIO, training, evaluation, checkpoint, and a resume to the same weights.

python -m benchmarks.recipe_runs ../shared/data [NAME...]

The folder holds cifar10/{train,test}.parquet and imagenette224/{train,validation}.parquet.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "recipe-runs"
OUTPUTS = Path("outputs") / "recipe-runs"
SHORTENED = "--save_strategy steps --eval_strategy no --logging_steps 10 --report_to none --dataloader_num_workers 1"
QUANTITIES = ("value", "grad_norm", "loss")


@dataclasses.dataclass(frozen=True)
class Run:
    """A shortened recipe.

    Attributes:
        recipe: its name.
        splits: its data files by split.
        steps: optimiser steps; the checkpoint that is resumed from is half-way.
        options: what else shortens it.
    """

    recipe: str
    splits: dict[str, str]
    steps: int
    options: str


RUNS = {
    "vit-tiny-cifar10": Run(
        "vit-tiny/cifar10/nio",
        {"train": "cifar10/train.parquet", "test": "cifar10/test.parquet"},
        300,
        "--image_column image --global_batch_size 64 --per_device_train_batch_size 64 --max_eval_samples 2000 "
        "--per_device_eval_batch_size 100",
    ),
    "swin-tiny-imagenette": Run(
        "swin-tiny/imagenette/nio",
        {"train": "imagenette224/train.parquet", "validation": "imagenette224/validation.parquet"},
        200,
        "--dataset_revision null --bf16 false --global_batch_size 8 --per_device_train_batch_size 8 "
        "--max_eval_samples 300 --nio_batch_size 16 --nio_report_batches 2 "
        "--per_device_eval_batch_size 20 --learning_rate 2e-4",
    ),
}


def main() -> None:
    """Run, and write a result and the plots of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("names", nargs="*", default=[], choices=[[], *RUNS])
    arguments = parser.parse_args()
    for name in arguments.names or RUNS:
        result = measure(RUNS[name], arguments.data, OUTPUTS / name)
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for plot in ("nio_history", "training"):
            shutil.copy(OUTPUTS / name / "whole" / "plots" / f"{plot}.png", RESULTS / f"{name}-{plot}.png")


def measure(run: Run, data: Path, output: Path) -> dict[str, Any]:
    """Train once through and once from the checkpoint half-way."""
    half = run.steps // 2
    files = [part for split, file in run.splits.items() for part in (f"--data_files.{split}", str(data / file))]
    options = [*SHORTENED.split(), *run.options.split(), "--max_steps", str(run.steps), "--save_steps", str(half)]
    command = [sys.executable, "-m", "nio_hf.cli", "train", run.recipe, "--dataset_name", "parquet", *files, *options]
    subprocess.run([*command, "--output_dir", str(output / "whole")], check=True)
    resume = ["--resume_from_checkpoint", str(output / "whole" / f"checkpoint-{half}")]
    subprocess.run([*command, "--output_dir", str(output / "resumed"), *resume], check=True)
    state = json.loads((output / "whole" / "_nio_init" / "nio_state.json").read_text(encoding="utf-8"))
    history = json.loads((output / "whole" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    metrics = json.loads((output / "whole" / "all_results.json").read_text(encoding="utf-8"))
    nio = state["result"]
    return {
        "recipe": run.recipe,
        "options": " ".join(["--dataset_name parquet", *options]),
        "nio": {when: {key: nio[when][key] for key in QUANTITIES} for when in ("before", "after")}
        | {"status": nio["status"], "iterations": len(nio["history"]), "seconds": nio["seconds"]},
        "metrics": metrics,
        "loss by step": {entry["step"]: entry["loss"] for entry in history if "loss" in entry},
        "resumed from step": half,
        "resumed run ends with the same weights": _digest(output / "whole") == _digest(output / "resumed"),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "versions": state["versions"],
    }


def _digest(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
