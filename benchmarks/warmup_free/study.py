"""The comparisons of the study, each with all that makes it; one that was interrupted goes on.

python -m benchmarks.warmup_free.study ../shared/data --jobs 2
python -m benchmarks.warmup_free.study ../shared/data vit swin

The folder holds cifar10/{train,test}.parquet, and for comparisons on Imagenette
imagenette224/{train,validation}.parquet. Runs go to outputs/warmup-free/NAME; what is to be kept of a comparison, its
runs, tables and plots, is copied to benchmarks/results/warmup-free/NAME, and taken from there where it goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from nio_hf.comparison.arms import choose_arms
from nio_hf.comparison.command import run_comparison
from nio_hf.comparison.plan import Plan
from nio_hf.console import INTERRUPTED
from nio_hf.files import write_atomically
from nio_hf.trials.results import RESULTS_NAME
from nio_hf.trials.run import Run

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parent / "results" / "warmup-free"
OUTPUTS = Path("outputs") / "warmup-free"
KEPT = (RESULTS_NAME, "comparison.json", "comparison.md", "learning_rates.png", "first_steps.png")
SEEDS = 3
"""To choose by."""
SPLITS = {
    "cifar10": {"train": "train", "test": "test"},
    "imagenette224": {"train": "train", "validation": "validation"},
}

CONTROLS = {
    "range2": "no_warmup,model_config.initializer_range=0.04",
    "range4": "no_warmup,model_config.initializer_range=0.08",
    "nio_warmup": "warmup,nio=true,nio_method=nio",
}
"""{name: what is held against NIO}: the class's own initialisation with 2 and 4 times its standard deviation, which
costs nothing, and NIO with warmup, to see whether that still gains something."""
CONTROLS_SEEDED = {
    "range4_seeded": "gi_adam,model_config.initializer_range=0.08",
    "nio_seeded_warmup": "warmup,nio=true,nio_method=nio,nio_seed_optimizer=gi_adam",
}
"""{name: what is held against NIO with the second moment seeded}."""
METHODS = "gradinit,lsuv,emergence,architecture_aware"
GRIDS = {"vit": "1.25e-4,2.5e-4,5e-4,1e-3,2e-3,4e-3,8e-3", "swin": "2.5e-4,5e-4,1e-3,2e-3,4e-3,8e-3,1.6e-2"}
"""{small model: learning rates}: 5e-4 to 8e-3, and the next one where the best of an arm lay at an end."""
GRIDS_CLIPPED = {"vit": "5e-4,1e-3,2e-3,4e-3", "swin": "1e-3,2e-3,4e-3,8e-3"}
"""{small model: learning rates with clipping}: 1e-3 to 4e-3, and where warmup, nio or nio_seeded was best without."""
BEST, BEST_SEEDED = {"vit": "5e-4", "swin": "1e-3"}, {"vit": "4e-3", "swin": "8e-3"}
"""{small model: learning rate at which the arm nio, or nio_seeded, is best}: that of its controls."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A comparison of the study.

    Attributes:
        recipe: a file of this folder without its suffix, or the name of a recipe of the package.
        arms: by name, between commas.
        definitions: {name: definition} of further arms.
        learning_rates, warmup_ratios: of the grid, between commas.
        verdict_seeds: fresh seeds to judge by; 0 for none.
        steps: budget of a run.
        options: settings that all runs share.
        data: folder of the data.
        basis: name of a comparison with the same settings, whose runs of the same arms are taken rather than repeated.
    """

    recipe: str
    arms: str = "no_warmup,warmup,nio,gi_adam,nio_seeded,radam"
    definitions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    learning_rates: str = "5e-4,1e-3,2e-3,4e-3,8e-3"
    warmup_ratios: str = "0.02,0.05,0.1,0.3"
    verdict_seeds: int = 5
    steps: int = 500
    options: tuple[str, ...] = ()
    data: str = "cifar10"
    basis: str | None = None

    @property
    def arm_definitions(self) -> list[str]:
        """Definitions of the further arms, as `nio-hf compare --arm` takes them."""
        return [f"{name}={definition}" for name, definition in self.definitions.items()]

    def plan(self) -> Plan:
        """What it consists of."""
        arms = choose_arms(self.arms.split(","), self.arm_definitions)
        rates, ratios = (tuple(map(float, numbers.split(","))) for numbers in (self.learning_rates, self.warmup_ratios))
        return Plan(arms, rates, ratios, SEEDS, self.verdict_seeds, self.steps)


def _small(model: str) -> dict[str, Comparison]:
    """The comparisons of one of the two small models."""
    return {
        model: Comparison(model, learning_rates=GRIDS[model]),
        f"{model}-clipped": Comparison(
            model,
            learning_rates=GRIDS_CLIPPED[model],
            warmup_ratios="0.1,0.3",
            options=("--max_grad_norm", "1.0"),
        ),
        f"{model}-controls": Comparison(
            model,
            f"no_warmup,warmup,nio,gi_adam,uncorrected,{METHODS}",
            CONTROLS,
            BEST[model],
            "0.3,0.5",
            verdict_seeds=0,
            basis=model,
        ),
        f"{model}-seeded": Comparison(
            model,
            "gi_adam,nio_seeded,uncorrected",
            CONTROLS_SEEDED,
            BEST_SEEDED[model],
            "0.3",
            verdict_seeds=0,
            basis=model,
        ),
    }


COMPARISONS = {
    **_small("vit"),
    **_small("swin"),
    "vit-low": Comparison("vit", "no_warmup,warmup", learning_rates="6.25e-5", warmup_ratios="0.3", verdict_seeds=0),
    "imagenette-vit": Comparison(
        "vit-small/imagenette/no_warmup", steps=2000, learning_rates="5e-4,1e-3,2e-3,4e-3", data="imagenette224"
    ),
    "imagenette-swin": Comparison(
        "swin-tiny/imagenette/no_warmup", steps=2000, learning_rates="5e-4,1e-3,2e-3,4e-3", data="imagenette224"
    ),
}
"""{name: comparison}; those on Imagenette are for a GPU."""
ON_A_CPU = tuple(name for name, made in COMPARISONS.items() if made.data == "cifar10")


def carry_out(name: str, data: Path, jobs: int) -> int:
    """Carry out a comparison, and keep what came of it; returns its exit status."""
    made = COMPARISONS[name]
    own = FOLDER / f"{made.recipe}.yaml"
    options = ["--dataset_name", "parquet", *data_options(made.data, data)]
    output, kept = OUTPUTS / name, RESULTS / name
    if _lines(kept / RESULTS_NAME) > _lines(output / RESULTS_NAME):
        output.mkdir(parents=True, exist_ok=True)
        shutil.copy(kept / RESULTS_NAME, output / RESULTS_NAME)
    if made.basis is not None and not (output / RESULTS_NAME).is_file():
        own_runs, kept_runs = (folder / made.basis / RESULTS_NAME for folder in (OUTPUTS, RESULTS))
        take_runs(made, own_runs if own_runs.is_file() else kept_runs, output / RESULTS_NAME)
    status = run_comparison(
        [str(own) if own.is_file() else made.recipe, *options, *made.options],
        arms=made.arms,
        definitions=made.arm_definitions,
        learning_rates=made.learning_rates,
        warmup_ratios=made.warmup_ratios,
        seeds=SEEDS,
        verdict_seeds=made.verdict_seeds,
        steps=made.steps,
        jobs=jobs,
        diagnostics=True,
        output_dir=output,
    )
    kept.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        if status in (0, INTERRUPTED) and (output / file).is_file():
            shutil.copy(output / file, kept / file)
    return status


def take_runs(made: Comparison, basis: Path, target: Path) -> None:
    """Begin the results of a comparison with the runs of its grid that another one has already."""
    if not basis.is_file():
        return
    header, *lines = basis.read_text(encoding="utf-8").splitlines(keepends=True)
    grid = set(made.plan().grid())
    taken = [line for line in lines if Run(**json.loads(line)["run"]) in grid]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, "".join([header, *taken]))


def data_options(name: str, data: Path) -> list[str]:
    """The files of a data set, as command line options."""
    files = {split: (data / name / f"{file}.parquet").resolve() for split, file in SPLITS[name].items()}
    return [f"--data_files.{split}={file}" for split, file in files.items()]


def _lines(file: Path) -> int:
    return len(file.read_bytes().splitlines()) if file.is_file() else 0


def main() -> int:
    """Carry out the comparisons that are named, or all that a CPU can do; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the data")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMPARISONS)}; default: on CIFAR-10")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    asked = parser.parse_args()
    unknown = [name for name in asked.names if name not in COMPARISONS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}. Choose from {', '.join(COMPARISONS)}")
    for name in asked.names or ON_A_CPU:
        status = carry_out(name, asked.data, asked.jobs)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
