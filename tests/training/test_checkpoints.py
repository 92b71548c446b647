"""Marks, states and the helpers that read and write them."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from nio_hf.errors import CheckpointError, OutputError
from nio_hf.training.checkpoints import STATE_NAME, ensure_writable, load_state, plain_values, read_state
from nio_hf.training.digests import fingerprint
from nio_hf.training.losses import ignores_num_items
from tests.training.toys import build


def test_fingerprint_knows_weights_not_names() -> None:
    first, second = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2))
    second[0].load_state_dict(first.state_dict())
    assert fingerprint(first) == fingerprint(second)
    with torch.no_grad():
        second[0].weight[0, 0] += 1e-6
    assert fingerprint(first) != fingerprint(second)


@pytest.mark.parametrize("content", [None, "not json", "{}", '{"format": 99}', "[]"])
def test_unreadable_states_are_refused_with_their_path(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / STATE_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=STATE_NAME):
        load_state(tmp_path)


def test_a_state_of_a_former_version_is_refused_with_its_former_settings(tmp_path: Path) -> None:
    config = {"iterations": 20, "holdout_batches": 4, "scale_sharing": "all", "max_loss_rise": 0.1, "lr": 0.05}
    (tmp_path / STATE_NAME).write_text(json.dumps({"format": 1, "task": {}, "result": {"config": config}}))
    with pytest.raises(CheckpointError) as raised:
        read_state(tmp_path)
    (problem,) = raised.value.problems
    assert problem.where == str(tmp_path / STATE_NAME)
    assert problem.found == (
        "format 1, known is 3, with settings of a former version: nio_holdout_batches, nio_scale_sharing, "
        "nio_max_loss_rise"
    )
    assert problem.fix == "Initialise again, or use the nio_hf version that wrote it"


def test_a_state_of_a_later_version_is_refused_with_its_format(tmp_path: Path) -> None:
    (tmp_path / STATE_NAME).write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match=r"format 99, known is 3\. Initialise again"):
        read_state(tmp_path)


def test_a_task_equals_itself_after_a_trip_through_json() -> None:
    settings = {"norm_band": (0.8, math.inf), "groups": {"positions": "position"}, "lr": None, "rate": 0.1 + 0.2}
    task = plain_values({"settings": settings, "batch_size": 64})
    assert json.loads(json.dumps(task)) == task
    assert task["settings"] == {**settings, "norm_band": [0.8, math.inf]}


def test_a_path_that_is_a_file_is_not_writable(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError):
        ensure_writable(file / "directory")


@pytest.mark.parametrize(
    ("name", "ignores"), [("vit", False), ("swin", False), ("swinv2", True), ("resnet", True), ("beit", True)]
)
def test_reading_the_head_tells_what_the_loss_does(name: str, ignores: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = build(name).eval()
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.arange(4)}
    with torch.no_grad(), caplog.at_level(logging.ERROR):
        mean, scaled = (float(model(**batch, **extra).loss) for extra in ({}, {"num_items_in_batch": 8}))
    assert ignores_num_items(model) is ignores
    assert (mean == pytest.approx(scaled)) is ignores


def test_a_subclass_that_keeps_the_forward_is_read_as_its_base() -> None:
    base = type(build("resnet"))
    model = type("OwnResNet", (base,), {})(build("resnet").config)
    assert ignores_num_items(model)
