"""Runs of NIO that end before their time, and what is taken over of them."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from nio_hf import NIOResult, NIOTrainer, core
from nio_hf.durable.manifest import fault_of, write_manifest
from nio_hf.errors import OutputError
from nio_hf.hub.run_folder import INIT_DIR_NAME, STATE_NAME
from nio_hf.trainer.digests import fingerprint
from tests.durable.trainings import PUBLISHED, Weights, make
from tests.trainer.toys import InterruptedAfter, Interruption, snapshot, unchanged


class NIORun(NamedTuple):
    """A run of NIO and its model after it."""

    result: NIOResult
    weights: Weights
    output_dir: Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of NIO that nothing happened to."""
    trainer = make(tmp_path_factory.mktemp("nio"), **PUBLISHED)
    result = trainer.run_nio()
    assert max(abs(omega - 1) for omega in result.scales.values()) > 0.01
    return NIORun(result, snapshot(trainer.model), trainer.nio_init_dir.parent)


@contextlib.contextmanager
def interruption_in(iteration):
    """Let NIO be interrupted in an iteration."""

    def initialize(*args, on_iteration, **kwargs):
        def watched(record):
            on_iteration(record)
            if record.iteration == iteration:
                raise Interruption

        return core.initialize(*args, on_iteration=watched, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nio_hf.trainer.running.initialize", initialize)
        with pytest.raises(Interruption):
            yield


def same(left, right):
    """Whether two runs measured and learned the same, but for the time that they took."""
    histories = [[dataclasses.replace(record, seconds=0.0) for record in result.history] for result in (left, right)]
    known = [(result.scales, result.groups, result.cost, result.before, result.after) for result in (left, right)]
    return known[0] == known[1] and histories[0] == histories[1]


@pytest.mark.parametrize(("search", "iteration"), [(PUBLISHED, 3), ({}, 1)], ids=["published", "computed"])
def test_an_interrupted_nio_leaves_the_model_and_begins_again(search, iteration, tmp_path):
    whole, interrupted, again = (make(tmp_path / name, **search) for name in ("whole", "run", "run"))
    before = snapshot(interrupted.model)
    with interruption_in(iteration):
        interrupted.run_nio()
    assert unchanged(before, snapshot(interrupted.model))
    assert not list((tmp_path / "run").iterdir())
    assert same(again.run_nio(resume=True), whole.run_nio())
    assert unchanged(snapshot(whole.model), snapshot(again.model))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [INIT_DIR_NAME]


def _other_weights(trainer, directory):
    with torch.no_grad():
        trainer.model.classifier.bias[0] += 1


def _other_settings(trainer, directory):
    trainer.args.nio_scale_range = [0.5, 2.0]


def _other_data(trainer, directory):
    trainer.train_dataset.images += 1


def test_a_finished_nio_is_taken_over_without_computing_and_reported_once(whole, tmp_path):
    output_dir = shutil.copytree(whole.output_dir, tmp_path / "run")
    trainer = make(output_dir, **PUBLISHED, max_steps=4, save_strategy="steps", save_steps=2)
    result = trainer.run_nio(resume=True)
    assert trainer.losses == 0
    assert unchanged(whole.weights, snapshot(trainer.model))
    assert (result.before, result.after, result.history) == (
        whole.result.before,
        whole.result.after,
        whole.result.history,
    )
    assert result.scales == whole.result.scales, "by the names of parameters"
    stop = InterruptedAfter(3)
    trainer.add_callback(stop)
    with pytest.raises(Interruption):
        trainer.train(resume_from_checkpoint="auto")
    trainer.remove_callback(stop)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.losses == 0
    log = trainer.state.log_history
    logged = [entry["nio_iteration"] for entry in log if "nio_iteration" in entry]
    assert logged == [record.iteration for record in whole.result.history]
    assert sum("nio_grad_cosine_after" in entry for entry in log) == 1


def _changed(trainer, directory):
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"\n")


def _of_another_version(trainer, directory):
    file = directory / STATE_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    write_manifest(directory)


@pytest.mark.parametrize("change", [_changed, _of_another_version, _other_settings, _other_weights, _other_data])
def test_a_finished_nio_that_does_not_fit_is_passed_over(change, whole, tmp_path, caplog):
    trainer = make(shutil.copytree(whole.output_dir, tmp_path / "run"), **PUBLISHED)
    change(trainer, trainer.nio_init_dir)
    with caplog.at_level(logging.WARNING, "nio_hf.trainer"):
        trainer.run_nio(resume=True)
    assert f"{INIT_DIR_NAME} is passed over: " in caplog.text
    assert trainer.losses > 0
    assert fault_of(trainer.nio_init_dir) is None
    mark = json.loads((trainer.nio_init_dir / STATE_NAME).read_text())["mark"]
    assert mark["fingerprint"] == fingerprint(trainer.model)


def test_a_full_disk_leaves_the_model_and_the_former_initialised_checkpoint(whole, tmp_path, monkeypatch):
    output_dir = Path(shutil.copytree(whole.output_dir, tmp_path / "run"))
    trainer = make(output_dir, **PUBLISHED)
    before = snapshot(trainer.model)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=rf"{INIT_DIR_NAME}: .*No space left"):
        trainer.run_nio()
    monkeypatch.undo()
    assert unchanged(before, snapshot(trainer.model))
    assert [path.name for path in output_dir.iterdir()] == [INIT_DIR_NAME]
    assert fault_of(trainer.nio_init_dir) is None


def test_too_little_room_is_found_before_nio_starts(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for start in ("run_nio", "train"):
        trainer = make(tmp_path, max_steps=2, save_strategy="steps")
        with pytest.raises(OutputError, match=r"0 MiB are free, a run needs at least \d+ MiB .*Free space"):
            getattr(trainer, start)()
        assert trainer.losses == 0
        assert list(tmp_path.iterdir()) == []


def test_the_room_that_a_training_needs_is_that_of_model_and_optimizer(tmp_path, monkeypatch):
    expected = [
        ({"nio_save_init": False}, 0),
        ({}, 1),
        ({"save_strategy": "steps"}, 4),
        ({"save_strategy": "steps", "save_only_model": True}, 2),
        ({"save_strategy": "steps", "optim": "sgd"}, 2),
    ]
    sizes = []
    monkeypatch.setattr("nio_hf.trainer.early_checks.ensure_writable", lambda folder, size=0: sizes.append(size))
    for number, (changes, _) in enumerate(expected):
        trainer = make(tmp_path / str(number), NIOTrainer, max_steps=1, **changes)
        trainer.train()
    model = 4 * sum(parameter.numel() for parameter in trainer.model.parameters())
    assert [size / model for size in sizes] == [copies for _, copies in expected]
