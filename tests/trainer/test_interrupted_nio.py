"""What is taken over of runs of NIO before a training, and where there is no room for it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from nio_hf import NIOTrainer
from nio_hf.durable.manifest import fault_of, write_manifest
from nio_hf.errors import OutputError
from nio_hf.hub.run_folder import INIT_DIR_NAME, STATE_NAME
from nio_hf.trainer.digests import fingerprint
from tests.durable.trainings import NO_SPACE, failing, make
from tests.trainer.toys import PUBLISHED, interrupted, refused, same_weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A trainer after a run of NIO that nothing happened to."""
    trainer = make(tmp_path_factory.mktemp("nio"), **PUBLISHED)
    result = trainer.run_nio()
    assert max(abs(omega - 1) for omega in result.scales.values()) > 0.01
    return trainer


@pytest.fixture
def run(whole, tmp_path):
    """A copy of its output, which a test may harm."""
    return Path(shutil.copytree(whole.args.output_dir, tmp_path / "run"))


def test_a_finished_nio_is_taken_over_without_computing_and_reported_once(whole, run):
    trainer = make(run, **PUBLISHED, max_steps=4, save_strategy="steps", save_steps=2)
    result, expected = trainer.run_nio(resume=True), whole.nio_result
    assert trainer.losses == 0
    assert same_weights(whole, trainer)
    assert (result.before, result.after, result.history) == (expected.before, expected.after, expected.history)
    assert result.scales == expected.scales, "by the names of parameters"
    interrupted(trainer, resume="auto").train(resume_from_checkpoint=True)
    assert trainer.losses == 0
    log = trainer.state.log_history
    logged = [entry["nio_iteration"] for entry in log if "nio_iteration" in entry]
    assert logged == [record.iteration for record in expected.history]
    assert sum("nio_grad_cosine_after" in entry for entry in log) == 1


def _changed(trainer, directory):
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"\n")


def _of_another_version(trainer, directory):
    file = directory / STATE_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    write_manifest(directory)


def _other_settings(trainer, directory):
    trainer.args.nio_scale_range = [0.5, 2.0]


def _other_weights(trainer, directory):
    with torch.no_grad():
        trainer.model.classifier.bias[0] += 1


def _other_data(trainer, directory):
    trainer.train_dataset.images += 1


@pytest.mark.parametrize("change", [_changed, _of_another_version, _other_settings, _other_weights, _other_data])
def test_a_finished_nio_that_does_not_fit_is_passed_over(change, run, caplog):
    trainer = make(run, **PUBLISHED)
    change(trainer, trainer.nio_init_dir)
    trainer.run_nio(resume=True)
    assert f"{INIT_DIR_NAME} is passed over: " in caplog.text
    assert trainer.losses > 0
    assert fault_of(trainer.nio_init_dir) is None
    mark = json.loads((trainer.nio_init_dir / STATE_NAME).read_text())["mark"]
    assert mark["fingerprint"] == fingerprint(trainer.model)


def test_a_full_disk_leaves_the_model_and_the_former_initialised_checkpoint(run, monkeypatch):
    trainer = make(run, **PUBLISHED)
    monkeypatch.setattr(os, "fsync", failing(NO_SPACE))
    with refused(trainer, OutputError, rf"{INIT_DIR_NAME}: .*No space left"):
        trainer.run_nio()
    monkeypatch.undo()
    assert [path.name for path in run.iterdir()] == [INIT_DIR_NAME]
    assert fault_of(trainer.nio_init_dir) is None


@pytest.mark.parametrize("start", ["run_nio", "train"])
def test_too_little_room_is_found_before_nio_starts(start, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    trainer = make(tmp_path, max_steps=2, save_strategy="steps")
    with pytest.raises(OutputError, match=r"0 MiB are free, a run needs at least \d+ MiB .*Free space"):
        getattr(trainer, start)()
    assert trainer.losses == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "copies"),
    [
        ({"nio_save_init": False}, 0),
        ({}, 1),
        ({"save_strategy": "steps"}, 4),
        ({"save_strategy": "steps", "save_only_model": True}, 2),
        ({"save_strategy": "steps", "optim": "sgd"}, 2),
    ],
)
def test_the_room_that_a_training_needs_is_that_of_model_and_optimizer(changes, copies, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr("nio_hf.trainer.early_checks.ensure_writable", lambda folder, size=0: sizes.append(size))
    trainer = make(tmp_path, NIOTrainer, max_steps=1, **changes)
    trainer.train()
    assert sizes == [copies * 4 * sum(parameter.numel() for parameter in trainer.model.parameters())]
