"""What of a run may be seen by others."""

from __future__ import annotations

import dataclasses

import yaml

from nio_hf.hub.sharing import shareable, shareable_recipe, shareable_run
from tests.hub.test_card import FACTS, INITIALISED


def test_paths_are_cut_to_their_names() -> None:
    given = {"a": "/data/mine/images", "b": ["/x/y.parquet", "relative/z"], "c": {"d": "/e/*.png"}, "f": 3, "g": "/"}
    assert shareable(given) == {"a": "images", "b": ["y.parquet", "relative/z"], "c": {"d": "*.png"}, "f": 3, "g": "/"}


def test_a_recipe_keeps_all_but_the_folders() -> None:
    given = {"output_dir": "/mine/run", "data_files": {"train": "/data/*.parquet"}, "learning_rate": 1e-3}
    shared = yaml.safe_load(shareable_recipe(yaml.safe_dump(given)))
    assert shared == {"output_dir": "run", "data_files": {"train": "*.parquet"}, "learning_rate": 1e-3}


def test_a_run_tells_no_folder_of_its_data() -> None:
    facts = dataclasses.replace(FACTS, dataset="/data/birds", arguments={"deepspeed": "/etc/zero.json", "seed": 3})
    run = shareable_run(dataclasses.replace(INITIALISED, facts=facts, recipe="data_dir: /data/birds\n"))
    assert (run.facts.dataset, run.facts.arguments) == ("birds", {"deepspeed": "zero.json", "seed": 3})
    assert run.recipe == "data_dir: birds\n"
    assert run.result is INITIALISED.result
