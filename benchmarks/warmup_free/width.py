"""The factor of all weights that NIO finds for a ViT, by its width.

python -m benchmarks.warmup_free.width ../shared/data

The model is that of the study, with heads of 32 and an MLP of four times the width, at other widths. The class draws
every matrix with standard deviation 0.02; beside NIO's factor stands the one that would bring this to 1 / sqrt width,
which keeps the variance of what a square matrix is applied to (LeCun et al. 1998, "Efficient BackProp", section 4.6).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.warmup_free.geometry import SEEDS, options_of
from benchmarks.warmup_free.study import FOLDER, RESULTS
from nio_hf.hub.run_folder import versions
from nio_hf.image_training.building import build_trainer
from nio_hf.recipe.loading import load_recipe
from nio_hf.report.tables import markdown_table
from nio_hf.trials.worker import summary

WIDTHS = (48, 96, 192, 384, 768)
HEAD, MLP_RATIO, CLASS_STANDARD_DEVIATION = 32, 4, 0.02
RESULT = RESULTS / "width.json"
COLUMNS = ("width", "1 / sqrt width", "NIO", "GradCosine", "gradient norm", "loss")


def found_by_nio(data: Path, width: int, seed: int) -> dict[str, Any]:
    """What NIO finds with the defaults of the package."""
    shape = {"hidden_size": width, "num_attention_heads": max(width // HEAD, 1), "intermediate_size": MLP_RATIO * width}
    options = [f"--model_config.{key}={value}" for key, value in shape.items()]
    with tempfile.TemporaryDirectory() as folder:
        options += [*options_of(data, seed), "--nio=true", f"--output_dir={folder}"]
        result = build_trainer(load_recipe(str(FOLDER / "vit.yaml"), options)).run_nio()
    found = summary(result)
    return {"factor": max(found.pop("scales")), **found}


def row(width: int, found: list[dict[str, Any]]) -> tuple[str, ...]:
    """Means over the seeds, as `COLUMNS`."""

    def mean(key: str) -> str:
        before, after = (statistics.fmean(each[key][place] for each in found) for place in (0, 1))
        return f"{before:.3g} -> {after:.3g}"

    kept = 1 / math.sqrt(width) / CLASS_STANDARD_DEVIATION
    factors = [each["factor"] for each in found]
    spread = f"{statistics.fmean(factors):.2f} ± {statistics.stdev(factors):.2f}"
    return (f"{width}", f"{kept:.2f}", spread, mean("grad_cosine"), mean("grad_norm"), mean("loss"))


def main() -> None:
    """Measure every width, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with cifar10/train.parquet and cifar10/test.parquet")
    data = parser.parse_args().data
    widths = {width: [found_by_nio(data, width, seed) for seed in SEEDS] for width in WIDTHS}
    RESULT.write_text(json.dumps({"versions": versions(), "widths": widths}, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(markdown_table(COLUMNS, [row(width, found) for width, found in widths.items()]) + "\n")


if __name__ == "__main__":
    main()
