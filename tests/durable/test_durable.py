"""Trainings that end before their time, and go on from a checkpoint that is whole."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import Trainer

from nio_hf.durable.manifest import MANIFEST_NAME, UNFINISHED_NAME, fault_of, has_manifest
from nio_hf.errors import CheckpointError, OutputError
from nio_hf.files import only_writer
from tests.durable.trainings import BEST, NO_SPACE, SAVING, Notes, failing, make, saved_weights, steps_saved, trained
from tests.trainer.toys import At, ToyImages, interrupted, refused, same_weights, snapshot, unchanged

FULL = "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"
"""Error of torch.save on a full disk, observed on a disk of 1 MiB."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The output of an undisturbed training of four steps, saved at steps 2 and 4."""
    output_dir = tmp_path_factory.mktemp("whole")
    trained(output_dir, **SAVING)
    return output_dir


@pytest.fixture
def run(whole, tmp_path):
    """A copy of the output of that training, which a test may harm."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_auto_begins_without_checkpoints_and_goes_on_with_them(whole, tmp_path):
    first = interrupted(make(tmp_path, **SAVING), resume="auto")
    assert first.resumed_from is None
    second = trained(tmp_path, resume="auto", **SAVING)
    assert second.resumed_from == tmp_path / "checkpoint-2"
    assert unchanged(saved_weights(whole / "checkpoint-4"), snapshot(second.model))


def _cut_off(checkpoint):
    (checkpoint / MANIFEST_NAME).unlink()
    (checkpoint / UNFINISHED_NAME).touch()
    os.truncate(checkpoint / "optimizer.pt", 10)


def _change(checkpoint):
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize(("harm", "reason"), [(_cut_off, MANIFEST_NAME), (_change, "model.safetensors")])
def test_a_newest_checkpoint_that_is_not_whole_is_passed_over(harm, reason, whole, run, caplog):
    harm(run / "checkpoint-4")
    (run / "checkpoint-4" / "of_another_run.bin").touch()
    resumed = trained(run, resume="auto", **SAVING)
    assert f"checkpoint-4 is passed over: {reason}" in caplog.text
    assert resumed.resumed_from == run / "checkpoint-2"
    assert unchanged(saved_weights(whole / "checkpoint-4"), snapshot(resumed.model))
    assert fault_of(run / "checkpoint-4") is None
    assert not (run / "checkpoint-4" / "of_another_run.bin").exists(), "a checkpoint is written anew"


def test_what_cannot_be_gone_on_from_is_refused(run, tmp_path):
    trainer, folder = make(tmp_path / "empty", **SAVING), tmp_path / "checkpoint-9"
    with pytest.raises(CheckpointError, match=r"no checkpoint that can be used.*'auto', which begins"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match=r"checkpoint-9' is no folder.*Give a folder OUTPUT_DIR/checkpoint-N"):
        trainer.train(resume_from_checkpoint=str(folder))
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoint-9: no trainer_state.json in it"):
        trainer.train(resume_from_checkpoint=str(folder))
    for step in (2, 4):
        _cut_off(run / f"checkpoint-{step}")
    with pytest.raises(CheckpointError, match="no checkpoint that can be used"):
        trained(run, resume=True, **SAVING)


def test_a_checkpoint_that_was_changed_is_refused_by_the_name_of_its_file_and_used_without_manifest(run):
    checkpoint = run / "checkpoint-2"
    weights = saved_weights(checkpoint)
    weights["vit.embeddings.cls_token"] += 1
    safetensors.torch.save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt", "note": "mine"})
    trainer, begun = make(run, **SAVING), []
    with refused(trainer, CheckpointError, r"checkpoint-2: model.safetensors has [\d,]+ bytes, not.*delete its nio_m"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / MANIFEST_NAME).unlink()
    trainer.add_callback(At("on_train_begin", lambda: begun.append(snapshot(trainer.model))))
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(begun[0]["vit.embeddings.cls_token"], weights["vit.embeddings.cls_token"])


@pytest.mark.parametrize("asked", ["auto", "path"])
def test_a_checkpoint_of_trainer_is_gone_on_from(asked, whole, tmp_path, caplog):
    interrupted(make(tmp_path, Trainer, **SAVING))
    checkpoint = tmp_path / "checkpoint-2"
    assert not has_manifest(checkpoint)
    resumed = trained(tmp_path, resume=str(checkpoint) if asked == "path" else asked, **SAVING)
    assert resumed.resumed_from == checkpoint
    assert unchanged(saved_weights(whole / "checkpoint-4"), snapshot(resumed.model))
    assert ("has no manifest" in caplog.text) == (asked != "path")


@pytest.mark.parametrize(
    ("samples", "length"),
    [(64, {"max_steps": 4}), (32, {"max_steps": 4}), (32, {"max_steps": -1, "num_train_epochs": 1})],
    ids=["within an epoch", "at the end of an epoch", "in epochs"],
)
def test_a_finished_training_that_is_started_again_trains_nothing(samples, length, tmp_path, caplog):
    settings = {**SAVING, **length, "train_dataset": ToyImages(samples)}
    finished = trained(tmp_path, **settings)
    again = make(tmp_path, **settings)
    assert again.train(resume_from_checkpoint="auto").global_step == 4
    assert "checkpoint-4 is the end of that training: it was loaded, nothing was trained." in caplog.text
    assert (again.state.epoch, again.state.num_train_epochs) == (finished.state.epoch, finished.state.num_train_epochs)
    assert same_weights(finished, again)


@pytest.mark.parametrize(("limit", "kept"), [(None, [2, 4]), (1, [4])])
def test_checkpoints_are_sealed_with_what_callbacks_wrote_and_kept_up_to_the_limit(limit, kept, tmp_path):
    trainer = trained(tmp_path, callbacks=[Notes()], save_total_limit=limit, **SAVING)
    assert steps_saved(tmp_path) == kept
    checkpoint = tmp_path / "checkpoint-4"
    assert "average/notes.txt" in json.loads((checkpoint / MANIFEST_NAME).read_text())["files"]
    assert fault_of(checkpoint) is None
    saved = torch.load(checkpoint / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == trainer.args.save_total_limit == limit
    os.truncate(checkpoint / "average" / "notes.txt", 3)
    assert "average/notes.txt has 3 bytes, not 13" in str(fault_of(checkpoint))


def test_the_best_checkpoint_is_kept_beside_the_newest_and_loaded(tmp_path):
    evaluating = {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1}
    settings = {**SAVING, **BEST, **evaluating}
    interrupted(make(tmp_path, **settings))
    assert steps_saved(tmp_path) == [1, 3]
    resumed = trained(tmp_path, resume="auto", **settings)
    assert resumed.resumed_from == tmp_path / "checkpoint-3"
    assert steps_saved(tmp_path) == [1]
    assert unchanged(saved_weights(tmp_path / "checkpoint-1"), snapshot(resumed.model))


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("torch.save", RuntimeError(FULL)),
        ("transformers.trainer.TrainerState.save_to_json", NO_SPACE),
        ("transformers.PreTrainedModel.save_pretrained", NO_SPACE),
        ("os.fsync", NO_SPACE),
    ],
)
def test_a_full_disk_in_a_save_leaves_the_earlier_checkpoint(target, error, whole, tmp_path, monkeypatch):
    full = At("on_step_end", lambda: monkeypatch.setattr(target, failing(error)), 4)
    trainer = make(tmp_path, callbacks=[full], **SAVING, save_total_limit=1)
    with pytest.raises(OutputError, match=r"checkpoint-4: .*Free space .* checkpoints saved before are whole"):
        trainer.train()
    monkeypatch.undo()
    assert steps_saved(tmp_path) == [2], "what cannot be used takes room"
    assert fault_of(tmp_path / "checkpoint-2") is None
    assert trainer.args.save_total_limit == 1
    resumed = trained(tmp_path, resume="auto", **SAVING, save_total_limit=1)
    assert unchanged(saved_weights(whole / "checkpoint-4"), snapshot(resumed.model))


def test_an_error_that_is_not_of_the_disk_stays_as_it_is(tmp_path, monkeypatch):
    broken = At("on_step_end", lambda: monkeypatch.setattr(torch, "save", failing(RuntimeError("CUDA error"))), 2)
    with pytest.raises(RuntimeError, match=r"^CUDA error$"):
        trained(tmp_path, callbacks=[broken], **SAVING)


def test_a_second_training_into_the_same_folder_is_refused(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "lockf", failing(BlockingIOError()))
    with pytest.raises(OutputError, match=r"another training writes here\. Wait for it to end"):
        trained(tmp_path, **SAVING)
    monkeypatch.setattr(fcntl, "lockf", failing(OSError(errno.ENOLCK, "no locks here")))
    with only_writer(tmp_path):
        assert (tmp_path / "_nio_lock").exists()
    assert not (tmp_path / "_nio_lock").exists()


def test_what_is_saved_of_a_schedule_free_training_is_what_is_evaluated(tmp_path):
    pytest.importorskip("schedulefree")
    evaluated = []
    rate = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "optim": "schedule_free_adamw"}
    trainer = make(tmp_path, **SAVING, **rate, eval_strategy="steps", eval_steps=2)
    for step in (2, 4):
        trainer.add_callback(At("on_evaluate", lambda: evaluated.append(snapshot(trainer.model)), step))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert unchanged(evaluated[0], saved_weights(tmp_path / "checkpoint-2"))
    assert unchanged(evaluated[1], saved_weights(tmp_path / "final"))
    assert not unchanged(*evaluated)
