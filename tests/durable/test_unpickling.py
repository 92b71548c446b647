"""No checkpoint runs code: what is unpickled when training resumes, when the best is loaded, and under DeepSpeed."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from nio_hf import NIOTrainer
from nio_hf.durable.manifest import write_manifest
from nio_hf.durable.unpickling import weights_only
from nio_hf.errors import CheckpointError
from tests.trainer.toys import ToyImages, arguments, build

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
FORBID = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
SETTINGS: dict[str, Any] = {
    "nio": False,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "step",
    "greater_is_better": False,
}


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


class FirstIsBest(NIOTrainer):
    """Evaluates to the step, so that the first one is the best."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {**super().evaluate(*args, **kwargs), "eval_step": float(self.state.global_step)}


class Recorder:
    """What is opened and unpickled, and how."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded: list[tuple[str, Any]] = []
        self.opened: list[str] = []
        self.unpickled = 0
        load, opening, unpickle = torch.load, builtins.open, pickle.load

        def recorded_load(file: Any, *args: Any, **kwargs: Any) -> Any:
            self.loaded.append((Path(file).name, kwargs.get("weights_only")))
            return load(file, *args, **kwargs)

        def recorded_open(file: Any, *args: Any, **kwargs: Any) -> Any:
            self.opened.append(str(file))
            return opening(file, *args, **kwargs)

        def recorded_unpickle(*args: Any, **kwargs: Any) -> Any:
            self.unpickled += 1
            return unpickle(*args, **kwargs)

        monkeypatch.setattr(torch, "load", recorded_load)
        monkeypatch.setattr(builtins, "open", recorded_open)
        monkeypatch.setattr(pickle, "load", recorded_unpickle)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which nobody has said how torch is to load."""
    with warnings.catch_warnings(action="ignore"):
        pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    for name in (FORCE, FORBID):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_recorder_sees_what_trainer_would_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": 1}, tmp_path / "file.pt")
    recorder = Recorder(monkeypatch)
    torch.load(tmp_path / "file.pt", weights_only=False)
    with open(tmp_path / "file.pt", "rb"):  # noqa: PTH123
        pass
    pickle.load(io.BytesIO(pickle.dumps(1)))
    assert recorder.loaded == [("file.pt", False)]
    assert recorder.opened[-1] == str(tmp_path / "file.pt")
    assert recorder.unpickled == 1


def test_resuming_and_loading_the_best_unpickle_tensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _trainer(tmp_path).train()
    for file in tmp_path.rglob("training_args.bin"):
        file.write_bytes(pickle.dumps(Malicious(tmp_path / "proof")))
    for checkpoint in tmp_path.glob("checkpoint-*"):
        write_manifest(checkpoint)
    recorder = Recorder(monkeypatch)
    _trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert {name for name, _ in recorder.loaded} >= {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert [mode for _, mode in recorder.loaded] == [True] * len(recorder.loaded)
    assert recorder.unpickled == 0
    read = [name for name in recorder.opened if name.endswith("training_args.bin")]
    assert read == []
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_checkpoint_that_holds_code_is_refused_and_runs_none(sealed: bool, name: str, tmp_path: Path) -> None:
    _trainer(tmp_path, NIOTrainer if sealed else Trainer, load_best_model_at_end=False, eval_strategy="no").train()
    checkpoint = tmp_path / "checkpoint-2"
    torch.save({"state": Malicious(tmp_path / "proof")}, checkpoint / name)
    if sealed:
        write_manifest(checkpoint)
    with pytest.raises((pickle.UnpicklingError, CheckpointError), match="Weights only load failed"):
        _trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "proof").exists()


def test_a_checkpoint_that_holds_code_is_refused_with_an_error_of_ours(tmp_path: Path) -> None:
    _trainer(tmp_path).train()
    checkpoint = tmp_path / "checkpoint-2"
    torch.save({"state": Malicious(tmp_path / "proof")}, checkpoint / "optimizer.pt")
    write_manifest(checkpoint)
    with pytest.raises(CheckpointError, match=str(checkpoint)):
        _trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))


def test_weights_that_hold_code_are_refused_and_run_none(tmp_path: Path) -> None:
    _trainer(tmp_path).train()
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "model.safetensors").unlink()
    torch.save({"weight": Malicious(tmp_path / "proof")}, checkpoint / "pytorch_model.bin")
    write_manifest(checkpoint)
    with pytest.raises(Exception, match="Weights only load failed"):
        _trainer(tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "proof").exists()


def test_code_is_refused_whatever_is_asked_for(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.save({"state": Malicious(tmp_path / "proof")}, tmp_path / "file.pt")
    with weights_only(), pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "file.pt", weights_only=False)
    assert not (tmp_path / "proof").exists()


def test_tensors_and_the_classes_of_deepspeed_are_read(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with weights_only():
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
    content = {"weight": torch.arange(3), "scaler": LossScaler(2.0), "stage": ZeroStageEnum(2)}
    torch.save(content, tmp_path / "file.pt")
    with weights_only():
        loaded = torch.load(tmp_path / "file.pt", weights_only=False)
    assert torch.equal(loaded["weight"], content["weight"])
    assert loaded["scaler"].cur_scale == 2.0
    assert loaded["stage"] == ZeroStageEnum(2)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file.pt", weights_only=True)


@pytest.mark.parametrize("former", [None, "0", "1"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_environment_is_as_it_was(fails: bool, former: str | None, environment: pytest.MonkeyPatch) -> None:
    if former is not None:
        environment.setenv(FORCE, former)
    before = list(torch.serialization.get_safe_globals())
    try:
        with weights_only():
            assert os.environ[FORCE] == "1"
            assert len(torch.serialization.get_safe_globals()) > len(before)
            if fails:
                raise ArithmeticError
    except ArithmeticError:
        assert fails
    assert os.environ.get(FORCE) == former
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_a_user_who_lets_torch_unpickle_anything_is_overruled(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv(FORBID, "1")
    torch.save({"weight": torch.arange(3)}, tmp_path / "tensors.pt")
    torch.save({"state": Malicious(tmp_path / "proof")}, tmp_path / "code.pt")
    with weights_only():
        assert torch.load(tmp_path / "tensors.pt", weights_only=False)["weight"].sum() == 3
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            torch.load(tmp_path / "code.pt", weights_only=False)
    assert not (tmp_path / "proof").exists()
    assert os.environ[FORBID] == "1"


def _trainer(output_dir: Path, trainer_class: Any = FirstIsBest, **changes: Any) -> Any:
    return trainer_class(
        model=build("vit", num_hidden_layers=1),
        args=arguments(output_dir, **{**SETTINGS, **changes}),
        train_dataset=ToyImages(),
        eval_dataset=ToyImages(8),
    )
