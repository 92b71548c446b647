"""Marks, states and the helpers that read and write them."""

import json

import pytest
import torch
from torch import nn

from nio_hf.errors import CheckpointError, OutputError
from nio_hf.files import ensure_writable
from nio_hf.hub.run_folder import STATE_NAME, read_state
from nio_hf.trainer.digests import fingerprint
from tests.trainer.toys import load_state


def test_fingerprint_knows_weights_not_names():
    first, second = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2))
    second[0].load_state_dict(first.state_dict())
    assert fingerprint(first) == fingerprint(second)
    with torch.no_grad():
        second[0].weight[0, 0] += 1e-6
    assert fingerprint(first) != fingerprint(second)


@pytest.mark.parametrize("content", [None, "not json", "{}", '{"format": 99}', "[]"])
def test_unreadable_states_are_refused_with_their_path(content, tmp_path):
    if content is not None:
        (tmp_path / STATE_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=STATE_NAME):
        load_state(tmp_path)


def test_a_state_of_a_former_version_is_refused_with_its_former_settings(tmp_path):
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


def test_a_state_of_a_later_version_is_refused_with_its_format(tmp_path):
    (tmp_path / STATE_NAME).write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match=r"format 99, known is 3\. Initialise again"):
        read_state(tmp_path)


def test_a_path_that_is_a_file_is_not_writable(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError):
        ensure_writable(file / "directory")
