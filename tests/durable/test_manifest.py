"""Manifests: checkpoints that are whole, the choice of the newest, and the deletion of old ones."""

import json
import os
import shutil
from pathlib import Path

import pytest
from transformers import TrainerState

from nio_hf.durable import manifest
from nio_hf.durable.manifest import (
    MANIFEST_NAME,
    UNFINISHED_NAME,
    begin,
    candidates,
    checkpoint_fault,
    fault_of,
    newest_usable,
    rotate,
    write_manifest,
)
from nio_hf.errors import OutputError
from nio_hf.files import write_atomically
from tests.durable.trainings import NO_SPACE, failing, steps_saved


@pytest.mark.parametrize("moment", ["_digest", "write_atomically"])
def test_a_checkpoint_whose_sealing_was_cut_off_is_not_taken_for_one_of_trainer(moment, tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint-1"
    begin(checkpoint)
    (checkpoint / "model.bin").write_bytes(b"weights")
    TrainerState().save_to_json(str(checkpoint / "trainer_state.json"))
    monkeypatch.setattr(manifest, moment, failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_manifest(checkpoint)
    monkeypatch.undo()
    assert "it was not written to its end" in str(checkpoint_fault(checkpoint))
    write_manifest(checkpoint)
    assert checkpoint_fault(checkpoint) is None
    assert sorted(path.name for path in checkpoint.iterdir()) == ["model.bin", MANIFEST_NAME, "trainer_state.json"]
    assert list(json.loads((checkpoint / MANIFEST_NAME).read_text())["files"]) == ["model.bin", "trainer_state.json"]


@pytest.mark.parametrize("later", ["sealed", "unsealed"])
def test_the_newest_is_the_one_written_last_sealed_or_of_trainer(later, tmp_path):
    sealed, unsealed = _sealed(tmp_path / "checkpoint-1"), _unsealed(tmp_path / "checkpoint-2")
    assert "trainer_state.json cannot be read" in str(checkpoint_fault(unsealed))
    TrainerState().save_to_json(str(unsealed / "trainer_state.json"))
    _saved_at(sealed, 2e9 if later == "sealed" else 1e9)
    os.utime(unsealed / "trainer_state.json", (1.5e9, 1.5e9))
    assert newest_usable(candidates(tmp_path)) == (sealed if later == "sealed" else unsealed)
    rotate(tmp_path, 1, [])
    assert steps_saved(tmp_path) == ([1] if later == "sealed" else [2])


def test_broken_ones_are_passed_over_and_it_is_said_why(tmp_path, caplog):
    sealed = [_sealed(tmp_path / f"checkpoint-{step}") for step in range(1, 7)]
    _, whole, changed, truncated, removed, replaced = sealed
    (whole / "README.md").write_text("added later, which does no harm")
    (changed / "parts" / "optimizer.bin").write_bytes(b"other")
    os.truncate(truncated / "model.bin", 99)
    (removed / "model.bin").unlink()
    (replaced / "model.bin").unlink()
    (replaced / "model.bin").mkdir()
    unfinished = _unsealed(tmp_path / "checkpoint-7")
    (unfinished / UNFINISHED_NAME).touch()
    assert newest_usable(candidates(tmp_path)) == whole
    faults = {
        changed: "parts/optimizer.bin has been changed: its SHA-256 is another one",
        truncated: "model.bin has 99 bytes, not 1,000",
        removed: "model.bin is missing",
        replaced: "model.bin is missing",
        unfinished: f"{MANIFEST_NAME} is missing: it was not written to its end",
    }
    said = sorted(record.getMessage() for record in caplog.records)
    assert said == [f"{checkpoint} is passed over: {fault}." for checkpoint, fault in faults.items()]
    assert fault_of(whole.rename(tmp_path / "elsewhere")) is None


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"\x00" * 300,
        b"[]",
        b'{"format": 99, "saved": 1.0, "files": {}}',
        b'{"format": 1, "saved": null, "files": {}}',
        b'{"format": 1, "saved": 1.0, "files": []}',
        b'{"format": 1, "saved": 1.0, "files": {"model.bin": ["many", "digest"]}}',
    ],
)
def test_a_manifest_that_cannot_be_read_is_as_good_as_none(content, tmp_path):
    checkpoint = _sealed(tmp_path / "checkpoint-1")
    (checkpoint / MANIFEST_NAME).unlink()
    if content is not None:
        (checkpoint / MANIFEST_NAME).write_bytes(content)
    assert f"{MANIFEST_NAME} is missing or cannot be read" in str(fault_of(checkpoint))
    assert newest_usable(candidates(tmp_path)) is None


def test_the_time_tells_the_newest_and_then_the_number(tmp_path):
    for step in (10, 9, 3):
        _sealed(tmp_path / f"checkpoint-{step}")
    assert newest_usable(candidates(tmp_path)) == tmp_path / "checkpoint-3"
    rotate(tmp_path, 2, [])
    assert steps_saved(tmp_path) == [3, 9]
    for step in (9, 3):
        _saved_at(tmp_path / f"checkpoint-{step}", 5.0)
    assert newest_usable(candidates(tmp_path)) == tmp_path / "checkpoint-9"


def test_other_names_are_left_alone(tmp_path):
    assert newest_usable(candidates(tmp_path / "missing")) is None
    others = ["checkpoint-abc", "checkpoint-5.old", "checkpoint--7", "my-checkpoint-8", "_nio_init"]
    for name in others:
        _sealed(tmp_path / name)
    (tmp_path / "checkpoint-3").write_text("a file")
    assert newest_usable(candidates(tmp_path)) is None
    kept = _sealed(tmp_path / "checkpoint-4")
    rotate(tmp_path, 1, [kept])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "checkpoint-3", "checkpoint-4"])


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        *((limit, [4], [1, 2, 3, 4]) for limit in (None, 0, -1, 9)),
        (1, [4], [4]),
        (2, [4], [3, 4]),
        (3, [4, 1], [1, 3, 4]),
        (1, [4, 1], [1, 4]),
        (1, [4, 77], [4]),
        (1, [1], [1]),
    ],
)
def test_the_oldest_are_deleted_down_to_the_limit(limit, keep, left, tmp_path, monkeypatch):
    for step in (1, 2, 3, 4):
        _sealed(tmp_path / f"checkpoint-{step}")
    monkeypatch.chdir(tmp_path)
    rotate(tmp_path, limit, [Path(f"checkpoint-{step}") for step in keep])
    assert steps_saved(tmp_path) == left


def test_half_written_ones_are_deleted_first_whatever_the_clock_says(tmp_path):
    _saved_at(_sealed(tmp_path / "checkpoint-1"), 4e9)
    for step in (3, 9):
        _unsealed(tmp_path / f"checkpoint-{step}")
    newest = _sealed(tmp_path / "checkpoint-4")
    rotate(tmp_path, 2, [newest])
    assert steps_saved(tmp_path) == [1, 4]
    rotate(tmp_path, 1, [newest])
    assert steps_saved(tmp_path) == [4]


@pytest.mark.parametrize("former", ["old", None])
@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace")])
def test_a_file_is_replaced_as_a_whole_or_not_at_all(owner, name, former, tmp_path, monkeypatch):
    file = tmp_path / "state.json"
    if former is not None:
        write_atomically(file, former)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(NO_SPACE))
        with pytest.raises(OSError, match="No space left"):
            write_atomically(file, "new")
    assert (file.read_text() if file.exists() else None) == former
    write_atomically(file, "Größe")
    assert file.read_text(encoding="utf-8") == "Größe"
    assert list(tmp_path.iterdir()) == [file]


def test_a_checkpoint_that_cannot_be_sealed_is_an_output_error(tmp_path, monkeypatch):
    checkpoint = _unsealed(tmp_path / "checkpoint-1")
    monkeypatch.setattr(os, "fsync", failing(NO_SPACE))
    with pytest.raises(OutputError, match=r"checkpoint-1: .*No space left.* Free space, then start again\."):
        write_manifest(checkpoint)
    assert fault_of(checkpoint) is not None
    monkeypatch.undo()
    shutil.rmtree(checkpoint)
    with pytest.raises(OutputError, match="checkpoint-1"):
        write_manifest(checkpoint)


def _unsealed(checkpoint):
    """A checkpoint without a manifest, as a killed training leaves it."""
    (checkpoint / "parts").mkdir(parents=True)
    (checkpoint / "model.bin").write_bytes(b"x" * 1000)
    (checkpoint / "parts" / "optimizer.bin").write_bytes(b"state")
    return checkpoint


def _sealed(checkpoint):
    write_manifest(_unsealed(checkpoint))
    return checkpoint


def _saved_at(checkpoint, seconds):
    """Change the time in the manifest of a checkpoint."""
    file = checkpoint / MANIFEST_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "saved": seconds}))
    return checkpoint
