"""The committed numbers of the image pipeline and of the recipe runs, and that both can be made again."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import image_pipeline, recipe_runs

RESULTS = Path(image_pipeline.__file__).parent / "results"
SAME_WORK = "decode, crop, resize and flip"


def test_the_pipeline_keeps_four_fifths_of_plain_pillow():
    result = json.loads((RESULTS / "image-pipeline.json").read_text())
    assert set(result["sizes"]) == set(image_pipeline.SIZES)
    for size, numbers in result["sizes"].items():
        assert numbers["pipeline / plain Pillow"][SAME_WORK] >= 0.8, size
    assert result["workers"] == 1
    small, large = (result["sizes"][size]["pipeline / plain Pillow"][SAME_WORK] for size in ("224x224", "500x375"))
    page = " ".join((RESULTS.parent.parent / "docs" / "images.md").read_text().split())
    assert f"keeps {small:.2f} (photos of 224 x 224) and {large:.2f} (500 x 375)" in page


def test_both_ways_do_the_same_work(monkeypatch):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((50, 40, 3), np.uint8)).save(buffer, "JPEG")
    monkeypatch.setattr(image_pipeline, "BATCH_SIZE", 2)
    monkeypatch.setattr(image_pipeline, "ROUNDS", 1)
    files = [buffer.getvalue()] * 6
    plain = next(iter(image_pipeline.plain(files, image_pipeline.PLAIN[SAME_WORK])))
    loader, consume = image_pipeline.pipeline(files)
    batch = next(iter(loader))
    assert batch["pixel_values"].shape == plain["pixel_values"].shape == (2, 3, 224, 224)
    assert consume(batch)["pixel_values"].is_floating_point()
    numbers = image_pipeline.measure(files)
    assert set(numbers["images per second"]) == {*image_pipeline.PLAIN, "pipeline"}


@pytest.mark.parametrize("name", recipe_runs.RUNS)
def test_recipes_ran_on_real_images_from_end_to_end(name):
    result = json.loads((RESULTS / "recipe-runs" / f"{name}.json").read_text())
    run = recipe_runs.RUNS[name]
    assert result["recipe"] == run.recipe
    assert result["resumed run ends with the same weights"] is True
    assert result["nio"]["iterations"] > 0
    losses = list(result["loss by step"].values())
    assert len(losses) == run.steps // 10
    assert sum(losses[-5:]) < sum(losses[:5])
    assert result["metrics"]["eval_accuracy"] > 0.13, "ten classes: chance is 0.10"
    for plot in ("nio_history", "training"):
        assert (RESULTS / "recipe-runs" / f"{name}-{plot}.png").is_file()
