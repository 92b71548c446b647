"""No checkpoint runs code: unpickling when a training resumes, loads its best model, or uses DeepSpeed."""

import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from nio_hf.durable.manifest import write_manifest
from nio_hf.durable.restoring import weights_only
from nio_hf.errors import CheckpointError
from tests.durable.trainings import BEST, SAVING, Counting, trained

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
FORBID = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def test_resuming_and_loading_the_best_unpickle_tensors_only(tmp_path, monkeypatch):
    loaded = {}
    load = torch.load

    def recorded(file, *args, **kwargs):
        loaded[Path(file).name] = kwargs.get("weights_only")
        return load(file, *args, **kwargs)

    settings = {**SAVING, **BEST, "eval_strategy": "steps", "eval_steps": 2}
    trained(tmp_path, **settings)
    for checkpoint in tmp_path.glob("checkpoint-*"):
        (checkpoint / "training_args.bin").write_bytes(pickle.dumps(Malicious(tmp_path / "proof")))
        write_manifest(checkpoint)
    monkeypatch.setattr(torch, "load", recorded)
    trained(tmp_path, resume=str(tmp_path / "checkpoint-2"), **settings)
    assert loaded == {"optimizer.pt": True, "scheduler.pt": True, "rng_state.pth": True}
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_a_checkpoint_that_holds_code_is_refused_and_runs_none(name, tmp_path):
    sealed = name != "scheduler.pt"
    trained(tmp_path, Counting if sealed else Trainer, **SAVING)
    checkpoint = tmp_path / "checkpoint-2"
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    torch.save({"state": Malicious(tmp_path / "proof")}, checkpoint / name)
    if sealed:
        write_manifest(checkpoint)
    with pytest.raises(CheckpointError, match=f"{checkpoint}: Weights only load failed"):
        trained(tmp_path, resume=str(checkpoint), **SAVING)
    assert not (tmp_path / "proof").exists()


@pytest.fixture
def environment(monkeypatch):
    """An environment with DeepSpeed and without the variables for loading by torch."""
    with warnings.catch_warnings(action="ignore"):
        pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    for name in (FORCE, FORBID):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_tensors_and_the_classes_of_deepspeed_are_read(environment, tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    content = {"weight": torch.arange(3), "scaler": LossScaler(2.0), "stage": ZeroStageEnum(2)}
    torch.save(content, tmp_path / "file.pt")
    with weights_only():
        loaded = torch.load(tmp_path / "file.pt", weights_only=False)
    assert torch.equal(loaded["weight"], content["weight"])
    assert (loaded["scaler"].cur_scale, loaded["stage"]) == (2.0, ZeroStageEnum(2))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file.pt", weights_only=True)


@pytest.mark.parametrize(("name", "former"), [(FORCE, None), (FORCE, "0"), (FORBID, "1")])
def test_the_environment_is_overruled_and_put_back(name, former, environment, tmp_path):
    if former is not None:
        environment.setenv(name, former)
    before = set(torch.serialization.get_safe_globals())
    torch.save({"state": Malicious(tmp_path / "proof")}, tmp_path / "code.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"), weights_only():
        torch.load(tmp_path / "code.pt", weights_only=False)
    assert not (tmp_path / "proof").exists()
    assert os.environ.get(name) == former
    assert set(torch.serialization.get_safe_globals()) == before
