"""Every recipe that comes with the package."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification

from nio_hf.recipe.catalog import recipe_names, recipes_dir
from nio_hf.recipe.loading import load_recipe

NAMES = recipe_names()


def test_every_yaml_file_of_the_tree_is_a_recipe() -> None:
    files = {path.relative_to(recipes_dir()).with_suffix("").as_posix() for path in recipes_dir().rglob("*.yaml")}
    assert files == set(NAMES)
    assert NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_builds_its_model_and_says_how_it_is_run(name: str) -> None:
    recipe = load_recipe(name)
    config = AutoConfig.for_model(recipe.model.model_type, **recipe.model.model_config)
    with torch.device("meta"):
        AutoModelForImageClassification.from_config(config)
    header = recipe.path.read_text().split("\n\n")[0]
    assert f"nio-hf train {name}" in header
    assert f"accelerate launch -m nio_hf.train {name}" in header
    if recipe.path.stem == "nio":
        assert recipe.training.nio
        assert recipe.training.warmup_steps == 0
