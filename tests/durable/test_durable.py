"""Trainings that end before their time, and go on from a checkpoint that is whole."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from transformers import Trainer, TrainerCallback

from nio_hf import NIOResult, NIOTrainer, core
from nio_hf.durable.manifest import MANIFEST_NAME, UNFINISHED_NAME, fault_of, has_manifest, write_manifest
from nio_hf.errors import CheckpointError, ConfigError, OutputError
from nio_hf.hub import trainer as hub_trainer
from nio_hf.hub.run_folder import INIT_DIR_NAME, STATE_NAME
from nio_hf.trainer.checkpoints import PROGRESS_NAME
from nio_hf.trainer.digests import fingerprint
from tests.trainer.toys import InterruptedAfter, Interruption, ToyImages, arguments, build, snapshot, unchanged

Weights = dict[str, torch.Tensor]
SAVING: dict[str, Any] = {"nio": False, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
FULL = "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"
"""What torch.save makes of a full disk, observed on one of 1 MiB."""


class Average(TrainerCallback):
    """Writes a file of its own into each checkpoint, as a callback of averaged weights does."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "average" / "weights.bin"
        file.parent.mkdir()
        file.write_bytes(b"average")


class Counting(NIOTrainer):
    """Counts the losses of NIO, and evaluates to the distance from step 1."""

    losses = 0

    def compute_nio_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.losses += 1
        return super().compute_nio_loss(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {**super().evaluate(*args, **kwargs), "eval_step": float(abs(self.state.global_step - 1))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a training of four steps that nothing happened to, saved at 2 and 4."""
    output_dir = tmp_path_factory.mktemp("whole")
    _trainer(output_dir, **SAVING).train()
    return output_dir


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of the output of that training, to be harmed."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


class NIORun(NamedTuple):
    """A run of NIO with its settings, its model after it and how many losses it took."""

    settings: dict[str, Any]
    result: NIOResult
    weights: Weights
    losses: int
    output_dir: Path


SEARCHES: dict[str, dict[str, Any]] = {
    "computed": {},
    "published": {"nio_search": "published", "nio_groups": "tensor", "nio_iterations": 5, "nio_lr": 0.05},
}


@pytest.fixture(scope="module", params=SEARCHES)
def nio_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NIORun:
    """A run of NIO that nothing happened to."""
    settings = {**SEARCHES[request.param], "nio_save_steps": 2}
    trainer = _trainer(tmp_path_factory.mktemp("nio"), **settings)
    result = trainer.run_nio()
    assert max(abs(omega - 1) for omega in result.scales.values()) > 0.01
    return NIORun(settings, result, snapshot(trainer.model), trainer.losses, trainer.nio_init_dir.parent)


published = pytest.mark.parametrize("nio_run", ["published"], indirect=True)
"""For what only a search with iterations has."""


def test_auto_begins_without_checkpoints_and_goes_on_with_them(whole: Path, tmp_path: Path) -> None:
    first = _trainer(tmp_path, callbacks=[InterruptedAfter(3)], **SAVING)
    with pytest.raises(Interruption):
        first.train(resume_from_checkpoint="auto")
    assert first.resumed_from is None
    second = _trainer(tmp_path, **SAVING)
    second.train(resume_from_checkpoint="auto")
    assert second.resumed_from == tmp_path / "checkpoint-2"
    assert unchanged(_saved(whole / "checkpoint-4"), snapshot(second.model))


@pytest.mark.parametrize("asked", [True, "auto"])
def test_a_run_that_lost_its_last_checkpoint_ends_with_the_same_weights(
    asked: str | bool, whole: Path, run: Path
) -> None:
    shutil.rmtree(run / "checkpoint-4")
    resumed = _trainer(run, **SAVING)
    resumed.train(resume_from_checkpoint=asked)
    assert resumed.resumed_from == run / "checkpoint-2"
    assert unchanged(_saved(whole / "checkpoint-4"), snapshot(resumed.model))


def _cut_off(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_NAME).unlink()
    (checkpoint / UNFINISHED_NAME).touch()
    os.truncate(checkpoint / "optimizer.pt", 10)


def _change(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(("harm", "reason"), [(_cut_off, MANIFEST_NAME), (_change, "model.safetensors")])
def test_auto_passes_over_a_newest_checkpoint_that_is_not_whole(
    harm: Callable[[Path], None], reason: str, whole: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harm(run / "checkpoint-4")
    resumed = _trainer(run, **SAVING)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint="auto")
    assert f"checkpoint-4 is passed over: {reason}" in caplog.text
    assert resumed.resumed_from == run / "checkpoint-2"
    assert unchanged(_saved(whole / "checkpoint-4"), snapshot(resumed.model))
    assert fault_of(run / "checkpoint-4") is None


def test_true_needs_a_checkpoint_that_is_whole(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint that can be used.*'auto', which begins"):
        _trainer(tmp_path / "empty", **SAVING).train(resume_from_checkpoint=True)
    for step in (2, 4):
        _cut_off(run / f"checkpoint-{step}")
    # Trainer raises a ValueError, and scripts catch it to begin.
    with pytest.raises(ValueError, match="no checkpoint that can be used"):
        _trainer(run, **SAVING).train(resume_from_checkpoint=True)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint-9' is no folder.*Give a folder OUTPUT_DIR/checkpoint-N"):
        _trainer(tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_a_folder_that_holds_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-9").mkdir()
    with pytest.raises(CheckpointError, match="checkpoint-9"):
        _trainer(tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


@pytest.mark.parametrize("name", ["optimizer.pt", "model.safetensors", "trainer_state.json", "training_args.bin"])
def test_a_checkpoint_whose_file_was_changed_is_refused_by_its_name(name: str, run: Path) -> None:
    with (run / "checkpoint-2" / name).open("ab") as file:
        file.write(b"\n")
    trainer = _trainer(run, **SAVING)
    before = snapshot(trainer.model)
    with pytest.raises(CheckpointError, match=rf"checkpoint-2: {name} has [\d,]+ bytes, not.*delete its nio_manifest"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert unchanged(before, snapshot(trainer.model))


def test_a_checkpoint_that_was_edited_on_purpose_is_used_without_its_manifest(run: Path) -> None:
    weights = _saved(run / "checkpoint-2")
    weights["vit.embeddings.cls_token"] = weights["vit.embeddings.cls_token"] + 1
    safetensors.torch.save_file(weights, run / "checkpoint-2" / "model.safetensors", metadata={"format": "pt"})
    (run / "checkpoint-2" / MANIFEST_NAME).unlink()
    begun: list[Weights] = []
    trainer = _trainer(run, **SAVING)
    trainer.add_callback(_OnTrainBegin(lambda: begun.append(snapshot(trainer.model))))
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert torch.equal(begun[0]["vit.embeddings.cls_token"], weights["vit.embeddings.cls_token"])


@pytest.mark.parametrize("asked", [True, "auto", "path"])
def test_a_checkpoint_of_trainer_is_gone_on_from(
    asked: str | bool, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = _trainer(tmp_path, Trainer, callbacks=[InterruptedAfter(3)], **SAVING)
    with pytest.raises(Interruption):
        plain.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert not has_manifest(checkpoint)
    resumed = _trainer(tmp_path, **SAVING)
    with caplog.at_level(logging.WARNING, logger="nio_hf"):
        resumed.train(resume_from_checkpoint=str(checkpoint) if asked == "path" else asked)
    assert resumed.resumed_from == checkpoint
    assert unchanged(_saved(whole / "checkpoint-4"), snapshot(resumed.model))
    assert ("has no manifest" in caplog.text) == (asked != "path")


@pytest.mark.parametrize("asked", [True, "auto"])
def test_a_checkpoint_without_an_optimizer_is_gone_on_from_as_trainer_does(asked: str | bool, tmp_path: Path) -> None:
    settings = {**SAVING, "save_only_model": True}
    with pytest.raises(Interruption):
        _trainer(tmp_path, callbacks=[InterruptedAfter(3)], **settings).train()
    begun: list[Weights] = []
    resumed = _trainer(tmp_path, **settings)
    resumed.add_callback(_OnTrainBegin(lambda: begun.append(snapshot(resumed.model))))
    resumed.train(resume_from_checkpoint=asked)
    assert unchanged(begun[0], _saved(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4


@pytest.mark.parametrize(
    ("samples", "length"),
    [(64, {"max_steps": 4}), (32, {"max_steps": 4}), (32, {"max_steps": -1, "num_train_epochs": 1})],
    ids=["within an epoch", "at the end of an epoch", "in epochs"],
)
def test_a_finished_training_that_is_started_again_trains_nothing(
    samples: int, length: dict[str, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**SAVING, **length}
    finished = _trainer(tmp_path, samples=samples, **settings)
    finished.train()
    again = _trainer(tmp_path, samples=samples, **settings)
    with caplog.at_level(logging.WARNING):
        output = again.train(resume_from_checkpoint="auto")
    assert "checkpoint-4 is the end of that training: it was loaded, nothing was trained." in caplog.text
    assert output.global_step == 4
    assert unchanged(snapshot(finished.model), snapshot(again.model))


def test_every_checkpoint_is_sealed_with_all_that_callbacks_wrote(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, **SAVING)
    trainer.add_callback(Average())
    trainer.train()
    for step in (2, 4):
        checkpoint = tmp_path / f"checkpoint-{step}"
        assert "average/weights.bin" in json.loads((checkpoint / MANIFEST_NAME).read_text())["files"]
        assert fault_of(checkpoint) is None
    os.truncate(checkpoint / "average" / "weights.bin", 3)
    assert "average/weights.bin has 3 bytes, not 7" in str(fault_of(checkpoint))


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_a_checkpoint_keeps_the_limit_that_the_user_gave(limit: int | None, tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, **SAVING, save_total_limit=limit)
    trainer.train()
    saved = torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == trainer.args.save_total_limit == limit
    assert _steps(tmp_path) == ([4] if limit == 1 else [2, 4])


def test_what_is_left_of_another_run_is_not_mixed_into_a_checkpoint(run: Path) -> None:
    (run / "checkpoint-2" / "of_another_run.bin").write_bytes(b"old")
    _trainer(run, **SAVING).train()
    assert not (run / "checkpoint-2" / "of_another_run.bin").exists()
    assert _steps(run) == [2, 4]


def test_the_best_checkpoint_is_kept_beside_the_newest_and_loaded(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        **SAVING,
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "step",
        "greater_is_better": False,
        "save_total_limit": 1,
    }
    interrupted = _trainer(tmp_path, callbacks=[InterruptedAfter(3)], **settings)
    with pytest.raises(Interruption):
        interrupted.train()
    assert _steps(tmp_path) == [1, 3]
    resumed = _trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.resumed_from == tmp_path / "checkpoint-3"
    assert _steps(tmp_path) == [1]
    assert unchanged(_saved(tmp_path / "checkpoint-1"), snapshot(resumed.model))


def _full_file(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _full_archive(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError(FULL)


@pytest.mark.parametrize(
    ("target", "failing"),
    [
        ("torch.save", _full_archive),
        ("transformers.trainer.TrainerState.save_to_json", _full_file),
        ("transformers.PreTrainedModel.save_pretrained", _full_file),
    ],
)
def test_a_full_disk_in_a_save_leaves_the_earlier_checkpoint(
    target: str, failing: Callable[..., None], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullFrom(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                monkeypatch.setattr(target, failing)

    trainer = _trainer(tmp_path, callbacks=[FullFrom()], **SAVING, save_total_limit=1)
    with pytest.raises(OutputError, match=r"checkpoint-4: .*Free space .* checkpoints saved before are whole"):
        trainer.train()
    monkeypatch.undo()
    assert _steps(tmp_path) == [2]
    assert fault_of(tmp_path / "checkpoint-2") is None
    assert trainer.args.save_total_limit == 1
    resumed = _trainer(tmp_path, **SAVING, save_total_limit=1)
    resumed.train(resume_from_checkpoint="auto")
    assert unchanged(_saved(whole / "checkpoint-4"), snapshot(resumed.model))


def test_a_full_disk_at_the_manifest_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_from = _At(4, lambda: monkeypatch.setattr(os, "fsync", _full_file))
    trainer = _trainer(tmp_path, callbacks=[full_from], **SAVING, save_total_limit=1)
    with pytest.raises(OutputError, match=r"checkpoint-4: .*No space left"):
        trainer.train()
    monkeypatch.undo()
    assert fault_of(tmp_path / "checkpoint-2") is None
    assert not (tmp_path / "checkpoint-4").exists(), "what cannot be used takes room"


def test_an_error_that_is_not_of_the_disk_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("CUDA error")

    trainer = _trainer(tmp_path, callbacks=[_At(2, lambda: monkeypatch.setattr(torch, "save", failing))], **SAVING)
    with pytest.raises(RuntimeError, match=r"^CUDA error$"):
        trainer.train()


def test_a_failed_upload_does_not_delete_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("the hub is not there")

    monkeypatch.setattr(hub_trainer, "publish", unreachable)
    trainer = _trainer(tmp_path, **SAVING)
    trainer.push_in_progress = None
    trainer.add_callback(_At(1, lambda: setattr(trainer.args, "push_to_hub", True)))
    with caplog.at_level("WARNING", logger="nio_hf"):
        trainer.train()
    assert "checkpoint-2 is not pushed; the training goes on. the hub is not there" in caplog.text
    assert trainer.state.global_step == trainer.state.max_steps
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").is_file()
    assert not (tmp_path / "_nio_push").exists()


def test_too_little_room_is_found_before_nio_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    for start in ("run_nio", "train"):
        trainer = _trainer(tmp_path, max_steps=2, save_strategy="steps")
        before = snapshot(trainer.model)
        with pytest.raises(OutputError, match=r"0 MiB are free, a run needs at least \d+ MiB .*Free space"):
            getattr(trainer, start)()
        assert unchanged(before, snapshot(trainer.model))
        assert trainer.losses == 0
        assert list(tmp_path.iterdir()) == []


def test_the_room_that_a_training_needs_is_that_of_model_and_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {}
    for name, changes in {
        "nothing": {"nio_save_init": False},
        "init": {},
        "training": {"save_strategy": "steps"},
        "only_model": {"save_strategy": "steps", "save_only_model": True},
        "sgd": {"save_strategy": "steps", "optim": "sgd"},
    }.items():
        trainer = _trainer(tmp_path / name, max_steps=1, **changes)
        with monkeypatch.context() as patch:
            target = "nio_hf.trainer.early_checks.ensure_writable"
            patch.setattr(target, lambda folder, size=0, name=name: needed.update({name: size}))
            trainer.train()
    size = 4 * sum(parameter.numel() for parameter in trainer.model.parameters())
    copies = {name: room / size for name, room in needed.items()}
    assert copies == {"nothing": 0, "init": 1, "training": 4, "only_model": 2, "sgd": 2}


@published
@pytest.mark.parametrize("iteration", [2, 4, 5])
def test_an_interrupted_nio_goes_on_to_the_same_scales(iteration: int, nio_run: NIORun, tmp_path: Path) -> None:
    interrupted = _trainer(tmp_path, **nio_run.settings)
    before = snapshot(interrupted.model)
    with pytest.raises(Interruption), _interrupted_in(iteration):
        interrupted.run_nio()
    assert unchanged(before, snapshot(interrupted.model))
    assert (tmp_path / PROGRESS_NAME).exists() == (iteration > 2)
    resumed = _trainer(tmp_path, **nio_run.settings)
    assert _same(resumed.run_nio(resume=True), nio_run.result)
    assert unchanged(nio_run.weights, snapshot(resumed.model))
    assert (resumed.losses < nio_run.losses) == (iteration > 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [INIT_DIR_NAME]


def test_an_interrupted_computation_of_scales_begins_again(tmp_path: Path) -> None:
    settings = {**SEARCHES["computed"], "nio_save_steps": 1}
    whole = _trainer(tmp_path / "whole", **settings)
    with pytest.raises(Interruption), _interrupted_in(1):
        _trainer(tmp_path / "run", **settings).run_nio()
    assert not (tmp_path / "run" / PROGRESS_NAME).exists()
    resumed = _trainer(tmp_path / "run", **settings)
    assert _same(resumed.run_nio(resume=True), whole.run_nio())
    assert resumed.losses == whole.losses
    assert unchanged(snapshot(whole.model), snapshot(resumed.model))


@published
def test_without_resume_an_interrupted_nio_begins_again(nio_run: NIORun, tmp_path: Path) -> None:
    _interrupt(tmp_path, **nio_run.settings)
    again = _trainer(tmp_path, **nio_run.settings)
    assert _same(again.run_nio(), nio_run.result)
    assert again.losses == nio_run.losses
    assert not (tmp_path / PROGRESS_NAME).exists()


@published
def test_training_resumes_nio_only_where_it_may_begin(tmp_path: Path, nio_run: NIORun) -> None:
    for asked, fewer in ((None, False), ("auto", True)):
        _interrupt(tmp_path / str(asked), **nio_run.settings)
        trainer = _trainer(tmp_path / str(asked), **nio_run.settings)
        trainer.train(resume_from_checkpoint=asked)
        assert (trainer.losses < nio_run.losses) == fewer


def _of_other_weights(trainer: Any, progress: Path) -> None:
    with torch.no_grad():
        trainer.model.classifier.bias[0] += 1


def _of_other_settings(trainer: Any, progress: Path) -> None:
    trainer.args.nio_scale_range = [0.5, 2.0]


def _of_other_batches(trainer: Any, progress: Path) -> None:
    trainer.args.nio_batch_size = 4


def _not_json(trainer: Any, progress: Path) -> None:
    progress.write_text(progress.read_text()[:-30])


def _binary(trainer: Any, progress: Path) -> None:
    progress.write_bytes(b"\xff\x00" * 50)


def _a_list(trainer: Any, progress: Path) -> None:
    progress.write_text("[]")


def _of_another_format(trainer: Any, progress: Path) -> None:
    progress.write_text(json.dumps({**json.loads(progress.read_text()), "format": 99}))


def _without_state(trainer: Any, progress: Path) -> None:
    progress.write_text(json.dumps({**json.loads(progress.read_text()), "state": {}}))


@pytest.mark.parametrize(
    "change",
    [
        _of_other_weights,
        _of_other_settings,
        _of_other_batches,
        _not_json,
        _binary,
        _a_list,
        _of_another_format,
        _without_state,
    ],
)
def test_progress_that_does_not_fit_is_passed_over(
    change: Callable[[Any, Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**SEARCHES["published"], "nio_save_steps": 2}
    _interrupt(tmp_path / "run", **settings)
    trainers = [_trainer(tmp_path / name, **settings) for name in ("run", "fresh")]
    for trainer in trainers:
        change(trainer, tmp_path / "run" / PROGRESS_NAME)
    with caplog.at_level(logging.WARNING, "nio_hf.trainer"):
        results = [trainer.run_nio(resume=True) for trainer in trainers]
    assert f"{PROGRESS_NAME} is passed over: " in caplog.text
    assert _same(*results)
    assert trainers[0].losses == trainers[1].losses


def test_a_finished_nio_is_taken_over_without_computing(nio_run: NIORun, tmp_path: Path) -> None:
    output_dir = shutil.copytree(nio_run.output_dir, tmp_path / "run")
    trainer = _trainer(output_dir, **nio_run.settings)
    result = trainer.run_nio(resume=True)
    assert trainer.losses == 0
    assert unchanged(nio_run.weights, snapshot(trainer.model))
    assert (result.before, result.after, result.history) == (
        nio_run.result.before,
        nio_run.result.after,
        nio_run.result.history,
    )
    assert [tensor.omega for tensor in result.tensors] == [tensor.omega for tensor in nio_run.result.tensors]
    assert not (tmp_path / "run" / PROGRESS_NAME).exists()


def test_the_scales_of_a_finished_nio_keep_the_names_of_their_parameters(nio_run: NIORun, tmp_path: Path) -> None:
    trainer = _trainer(shutil.copytree(nio_run.output_dir, tmp_path / "run"), **nio_run.settings)
    assert trainer.run_nio(resume=True).scales == nio_run.result.scales


def test_a_training_with_auto_takes_over_a_finished_nio_and_reports_it(nio_run: NIORun, tmp_path: Path) -> None:
    output_dir = shutil.copytree(nio_run.output_dir, tmp_path / "run")
    trainer = _trainer(output_dir, **nio_run.settings)
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.losses == 0
    assert _logged_iterations(trainer) == [record.iteration for record in nio_run.result.history]
    whole = _trainer(tmp_path / "whole", **nio_run.settings)
    whole.train()
    assert unchanged(snapshot(whole.model), snapshot(trainer.model))


def _its_file_changed(trainer: Any, directory: Path) -> None:
    _change(directory)


def _its_state_gone(trainer: Any, directory: Path) -> None:
    (directory / STATE_NAME).unlink()


def _its_state_of_another_version(trainer: Any, directory: Path) -> None:
    file = directory / STATE_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    write_manifest(directory)


def _its_settings_others(trainer: Any, directory: Path) -> None:
    trainer.args.nio_scale_range = [0.5, 2.0]


def _its_batches_others(trainer: Any, directory: Path) -> None:
    trainer.args.nio_batch_size = 4


def _its_model_another(trainer: Any, directory: Path) -> None:
    with torch.no_grad():
        trainer.model.classifier.bias[0] += 1


def test_a_finished_nio_of_other_data_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _trainer(tmp_path).run_nio()
    other = _trainer(tmp_path)
    other.train_dataset.images += 1
    with caplog.at_level(logging.WARNING):
        result = other.run_nio(resume=True)
    assert "_nio_init is passed over: it was made of other weights or data" in caplog.text
    fresh = _trainer(tmp_path / "fresh")
    fresh.train_dataset.images += 1
    assert result.scales == fresh.run_nio().scales


@pytest.mark.parametrize(
    "change",
    [
        _its_file_changed,
        _its_state_gone,
        _its_state_of_another_version,
        _its_settings_others,
        _its_batches_others,
        _its_model_another,
    ],
)
def test_a_finished_nio_that_does_not_fit_is_passed_over(
    change: Callable[[Any, Path], None], nio_run: NIORun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output_dir = shutil.copytree(nio_run.output_dir, tmp_path / "run")
    trainer = _trainer(output_dir, **nio_run.settings)
    change(trainer, trainer.nio_init_dir)
    with caplog.at_level(logging.WARNING, "nio_hf.trainer"):
        trainer.run_nio(resume=True)
    assert f"{INIT_DIR_NAME} is passed over: " in caplog.text
    assert trainer.losses > 0
    assert fault_of(trainer.nio_init_dir) is None
    mark = json.loads((trainer.nio_init_dir / STATE_NAME).read_text())["mark"]
    assert mark["fingerprint"] == fingerprint(trainer.model)


@published
def test_no_progress_is_written_where_none_is_asked_for(tmp_path: Path, nio_run: NIORun) -> None:
    settings = {**nio_run.settings, "nio_save_steps": 0}
    _interrupt(tmp_path, **settings)
    assert not (tmp_path / PROGRESS_NAME).exists()
    trainer = _trainer(tmp_path, **settings)
    assert _same(trainer.run_nio(resume=True), nio_run.result)


@pytest.mark.parametrize("steps", [-1, 2.5, True, "10"])
def test_steps_of_progress_that_make_no_sense_are_refused(steps: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nio_save_steps: .*Give a whole number, 0 for none"):
        arguments(tmp_path, nio_save_steps=steps)


def test_progress_that_cannot_be_written_leaves_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer(tmp_path, **SEARCHES["published"], nio_save_steps=1)
    before = snapshot(trainer.model)
    monkeypatch.setattr(os, "fsync", _full_file)
    with pytest.raises(OutputError, match=rf"{PROGRESS_NAME}: .*No space left"):
        trainer.run_nio()
    assert unchanged(before, snapshot(trainer.model))


def test_an_initialised_checkpoint_that_cannot_be_written_leaves_the_former_one(
    nio_run: NIORun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output_dir = shutil.copytree(nio_run.output_dir, tmp_path / "run")
    trainer = _trainer(output_dir, **{**nio_run.settings, "nio_save_steps": 0})
    before = snapshot(trainer.model)
    monkeypatch.setattr(os, "fsync", _full_file)
    with pytest.raises(OutputError, match=r"No space left"):
        trainer.run_nio()
    monkeypatch.undo()
    assert unchanged(before, snapshot(trainer.model))
    assert [path.name for path in Path(output_dir).iterdir()] == [INIT_DIR_NAME]
    assert fault_of(trainer.nio_init_dir) is None


def test_a_training_that_goes_on_in_the_same_trainer_logs_nio_once(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    stop = InterruptedAfter(3)
    trainer.add_callback(stop)
    with pytest.raises(Interruption):
        trainer.train()
    trainer.remove_callback(stop)
    trainer.train(resume_from_checkpoint=True)
    assert _logged_iterations(trainer) == [record.iteration for record in trainer.nio_result.history]
    assert sum("nio_grad_cosine_after" in entry for entry in trainer.state.log_history) == 1


class ScheduleFree(torch.optim.SGD):
    """Trains at other weights than it evaluates at, as schedule-free optimizers do."""

    trains = True

    def train(self) -> None:
        self._shift(True, -1.0)

    def eval(self) -> None:
        self._shift(False, 1.0)

    @torch.no_grad()
    def _shift(self, trains: bool, by: float) -> None:
        if self.trains != trains:
            for parameter in self.param_groups[0]["params"]:
                parameter += by
        self.trains = trains


class _OnEvaluate(TrainerCallback):
    def __init__(self) -> None:
        self.weights: dict[int, Weights] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights[state.global_step] = snapshot(model)


@pytest.mark.parametrize("optim", ["schedule_free_adamw", None])
def test_what_is_saved_of_a_schedule_free_training_is_what_is_evaluated(optim: str | None, tmp_path: Path) -> None:
    evaluated = _OnEvaluate()
    settings = {
        **SAVING,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
    }
    if optim is None:
        trainer = _trainer(tmp_path, callbacks=[evaluated], **settings)
        trainer.optimizer = ScheduleFree(trainer.model.parameters(), lr=0.1)
    else:
        pytest.importorskip("schedulefree")
        trainer = _trainer(tmp_path, callbacks=[evaluated], optim=optim, **settings)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert unchanged(evaluated.weights[2], _saved(tmp_path / "checkpoint-2"))
    assert unchanged(evaluated.weights[4], _saved(tmp_path / "final"))
    assert not unchanged(evaluated.weights[2], evaluated.weights[4])


class _OnTrainBegin(TrainerCallback):
    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._action()


class _At(TrainerCallback):
    """Does something at the end of a step, before the save that is due then."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self._step = step
        self._action = action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            self._action()


def _trainer(
    output_dir: Path,
    trainer_class: Callable[..., Any] = Counting,
    callbacks: list[TrainerCallback] | None = None,
    samples: int = 64,
    **changes: Any,
) -> Any:
    return trainer_class(
        model=build("vit", num_hidden_layers=1),
        args=arguments(output_dir, **changes),
        train_dataset=ToyImages(samples),
        eval_dataset=ToyImages(8),
        callbacks=callbacks,
    )


@contextlib.contextmanager
def _interrupted_in(iteration: int) -> Iterator[None]:
    """Let NIO be interrupted in an iteration, before the state is saved that is due at its end."""

    def initialize(*args: Any, on_iteration: Callable[[Any], None], **kwargs: Any) -> NIOResult:
        def watched(record: Any) -> None:
            on_iteration(record)
            if record.iteration == iteration:
                raise Interruption

        return core.initialize(*args, on_iteration=watched, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nio_hf.trainer.running.initialize", initialize)
        yield


def _interrupt(output_dir: Path, **settings: Any) -> None:
    """Leave what NIO has learned when it is interrupted in its fifth iteration."""
    with pytest.raises(Interruption), _interrupted_in(5):
        _trainer(output_dir, **settings).run_nio()


def _logged_iterations(trainer: NIOTrainer) -> list[int]:
    return [entry["nio_iteration"] for entry in trainer.state.log_history if "nio_iteration" in entry]


def _same(left: NIOResult, right: NIOResult) -> bool:
    """Whether two runs measured and learned the same, but for the time that they took."""
    histories = [[dataclasses.replace(record, seconds=0.0) for record in result.history] for result in (left, right)]
    return (
        (left.scales, left.groups, left.cost) == (right.scales, right.groups, right.cost)
        and histories[0] == histories[1]
        and (left.before, left.after) == (right.before, right.after)
    )


def _saved(checkpoint: Path) -> Weights:
    return snapshot(type(build("vit")).from_pretrained(checkpoint, dtype=torch.float32))


def _steps(output_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in output_dir.glob("checkpoint-*"))
