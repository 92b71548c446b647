"""Pushes of the Trainer: what arrives, when, and that none can end a training."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard

from nio_hf import NIOTrainer
from nio_hf.errors import ConfigError, HubError
from nio_hf.hub import CARD_NAME, Destination, push_folder
from nio_hf.hub import trainer as publishing
from nio_hf.hub.card import MARKER
from nio_hf.trainer.checkpoints import MARK_KEY
from tests.hub.loopback import LoopbackHub
from tests.trainer.toys import ToyImages, arguments, build, snapshot, unchanged

SAVING: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}


def make(output_dir: Path, **changes: Any) -> NIOTrainer:
    settings = {"push_to_hub": True, "hub_model_id": "user/model", **changes}
    return NIOTrainer(model=build("vit"), args=arguments(output_dir, **settings), train_dataset=ToyImages())


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_ONE_MORE_TRY", (0.01,))
    monkeypatch.setattr(
        "nio_hf.hub.trainer.publish.__kwdefaults__", {**publishing.publish.__kwdefaults__, "waits": (0.01,)}
    )


def files(hub: LoopbackHub, revision: str = "main") -> dict[str, bytes]:
    return hub.repositories["user/model"].files(revision)


def test_a_training_pushes_what_it_saves_and_nothing_else(hub: LoopbackHub, tmp_path: Path) -> None:
    trainer = make(tmp_path, hub_token="hf_write", hub_strategy="every_save", hub_always_push=True, **SAVING)
    trainer.train()
    trainer.push_to_hub()
    found = files(hub)
    assert safetensors.torch.load(found["model.safetensors"]).keys()
    assert found["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()
    assert {"config.json", "nio_state.json", "nio_run.json", CARD_NAME, "plots/nio_scales.png"} <= found.keys()
    assert not [
        name for name in found if name.endswith((".bin", ".pt", ".pth")) or name.startswith(("_", "checkpoint"))
    ]
    assert not [name for name, content in found.items() if b"hf_write" in content]
    titles = [commit.title for commit in hub.repositories["user/model"].commits]
    assert [title for title in titles if "progress" in title] == [f"Training in progress, step {n}" for n in (1, 2, 3)]
    assert titles[-1] == "Trained for 3 steps"
    assert not (tmp_path / "_nio_push").exists()


def test_a_checkpoint_to_resume_from_is_pushed_where_asked_for(hub: LoopbackHub, tmp_path: Path) -> None:
    trainer = make(tmp_path / "first", hub_strategy="checkpoint", hub_always_push=True, save_total_limit=1, **SAVING)
    trainer.train()
    pushed = {name: content for name, content in files(hub).items() if name.startswith("last-checkpoint/")}
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= pushed.keys()
    checkpoint = tmp_path / "second" / "checkpoint-3"
    for name, content in pushed.items():
        path = checkpoint / name.removeprefix("last-checkpoint/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    further = make(tmp_path / "second", push_to_hub=False, **{**SAVING, "max_steps": 4})
    further.train(resume_from_checkpoint=str(checkpoint))
    assert further.state.global_step == 4


def test_before_the_training_it_is_the_initialised_checkpoint(hub: LoopbackHub, tmp_path: Path) -> None:
    trainer = make(tmp_path, hub_private_repo=True)
    trainer.run_nio()
    commit = trainer.push_to_hub(tags=["mine"], license="mit")
    assert commit.repo_url.repo_id == "user/model"
    assert hub.repositories["user/model"].private
    found = files(hub)
    assert found["model.safetensors"] == (trainer.nio_init_dir / "model.safetensors").read_bytes()
    assert MARK_KEY.encode() in found["config.json"]
    card = ModelCard(found[CARD_NAME].decode())
    assert "not a trained model" in card.text
    assert (card.data.license, "mine" in card.data.tags) == ("mit", True)
    unsaved = make(tmp_path / "unsaved", nio_save_init=False)
    unsaved.run_nio()
    with pytest.raises(ConfigError, match="nio_save_init=True"):
        unsaved.push_to_hub()


def test_a_push_in_the_background_and_to_a_branch(hub: LoopbackHub, tmp_path: Path) -> None:
    trainer = make(tmp_path, hub_strategy="end")
    trainer.train()
    future = trainer.push_to_hub("My words", blocking=False, revision="v1")
    assert future.result(60).commit_url
    assert "model.safetensors" in files(hub, "v1")
    assert "model.safetensors" not in files(hub)
    assert hub.repositories["user/model"].commits[-1].title == "My words"


@pytest.mark.parametrize("token", ["hf_read", "hf_wrong"])
def test_what_cannot_be_pushed_is_refused_before_nio(hub: LoopbackHub, tmp_path: Path, token: str) -> None:
    with pytest.raises(HubError):
        make(tmp_path, hub_token=token)
    assert hub.repositories == {}
    assert not (tmp_path / "_nio_init").exists()


def test_no_push_that_fails_ends_or_changes_a_training(
    hub: LoopbackHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = make(tmp_path / "plain", push_to_hub=False, **SAVING)
    plain.train()
    trainer = make(tmp_path / "pushed", hub_always_push=True, **SAVING)
    hub.fail("POST /api/models/*/commit/*", status=503, times=None)
    with caplog.at_level(logging.WARNING, logger="nio_hf"):
        trainer.train()
        trainer._finish_current_push()
        trainer.save_model()
    assert unchanged(snapshot(plain.model), snapshot(trainer.model))
    assert "is not pushed; the training goes on" in caplog.text
    assert "The model is saved, but not pushed." in caplog.text
    assert (tmp_path / "pushed" / "checkpoint-3" / "nio_manifest.json").is_file()
    with pytest.raises(HubError, match=r"push it later: nio-hf push .* user/model"):
        trainer.push_to_hub()
    hub.clear()
    trainer.push_to_hub()
    assert "model.safetensors" in files(hub)


def test_a_hub_that_is_down_at_the_start_is_asked_again_at_the_end(
    hub: LoopbackHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail("* /api/*", status=503, times=None)
    with caplog.at_level(logging.WARNING, logger="nio_hf"):
        trainer = make(tmp_path, hub_strategy="end")
    assert "The Hub does not answer" in caplog.text
    trainer.train()
    hub.clear()
    trainer.push_to_hub()
    assert "model.safetensors" in files(hub)


def test_weights_come_back_bit_for_bit_and_nio_is_skipped(hub: LoopbackHub, tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.run_nio()
    trainer.push_to_hub()
    folder = tmp_path / "downloaded"
    for name in ("config.json", "model.safetensors", "nio_state.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(files(hub)[name])
    loaded = type(trainer.model).from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trainer.model.parameters(), strict=True))
    again = NIOTrainer(model=loaded, args=arguments(tmp_path / "again"), train_dataset=ToyImages())
    again.train()
    assert again.nio_result is None


def test_a_checkpoint_pushed_by_hand_is_a_model(hub: LoopbackHub, tmp_path: Path) -> None:
    trainer = make(tmp_path, push_to_hub=False, **SAVING)
    trainer.train()
    publishing.publish(tmp_path / "checkpoint-2", Destination("user/by-hand"))
    found = hub.repositories["user/by-hand"].files()
    assert {"model.safetensors", "nio_state.json", "trainer_state.json", "plots/training.png"} <= found.keys()
    assert not [name for name in found if name.endswith((".bin", ".pt", ".pth"))]
    assert "not finished: step 2 of 3" in found[CARD_NAME].decode()


def test_slow_pushes_arrive_in_their_order(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.delay("POST /api/models/*/preupload/*", seconds=1, times=2)
    trainer = make(tmp_path, hub_always_push=True, save_total_limit=1, **SAVING)
    trainer.train()
    trainer.push_to_hub()
    titles = [commit.title for commit in hub.repositories["user/model"].commits[1:]]
    assert titles == [*(f"Training in progress, step {number}" for number in (1, 2, 3)), "Trained for 3 steps"]
    assert files(hub)["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()


def test_a_push_that_cannot_be_set_aside_ends_no_training(
    hub: LoopbackHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path, **SAVING)
    (tmp_path / "_nio_push").touch()
    with caplog.at_level(logging.WARNING, logger="nio_hf"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert "is not pushed; the training goes on" in caplog.text


@pytest.mark.parametrize("fault", ["drop", "fail"])
def test_your_own_card_survives_a_fault_of_the_hub(hub: LoopbackHub, tmp_path: Path, fault: str) -> None:
    trainer = make(tmp_path, hub_strategy="end")
    trainer.train()
    trainer.push_to_hub()
    own = Path(tmp_path / CARD_NAME).read_text().replace(MARKER, "Mine.")
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / CARD_NAME).write_text(own)
    push_folder(folder, Destination("user/model"), message="My card")
    if fault == "drop":
        hub.drop("* */resolve/*/README.md", times=1)
    else:
        hub.fail("* */resolve/*/README.md", status=500, times=1)
    trainer.push_to_hub()
    assert files(hub)[CARD_NAME].decode() == own
    trainer.push_to_hub(revision="v2")
    assert files(hub, "v2")[CARD_NAME].decode() == own


def test_no_path_of_the_machine_is_pushed(hub: LoopbackHub, tmp_path: Path) -> None:
    samples = ToyImages()
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    args = arguments(
        tmp_path,
        push_to_hub=True,
        hub_model_id="user/model",
        hub_strategy="all_checkpoints",
        hub_always_push=True,
        report_to=["tensorboard"],
        **best,
        **SAVING,
    )
    trainer = NIOTrainer(model=build("vit"), args=args, train_dataset=samples, eval_dataset=samples)
    trainer.train()
    trainer.push_to_hub()
    found = files(hub)
    assert "checkpoint-3/trainer_state.json" in found
    for name, content in found.items():
        assert str(tmp_path).encode() not in content, name
        assert socket.gethostname() not in name
    assert str(tmp_path) in (tmp_path / "trainer_state.json").read_text(), "here it stays"


def test_a_public_repository_is_no_place_for_a_private_push(hub: LoopbackHub, tmp_path: Path) -> None:
    trainer = make(tmp_path, hub_strategy="end")
    trainer.train()
    trainer.push_to_hub()
    with pytest.raises(HubError, match="exists and is public"):
        trainer.push_to_hub(private=True)


def test_nothing_is_made_on_the_hub_before_there_is_something_to_push(hub: LoopbackHub, tmp_path: Path) -> None:
    make(tmp_path)
    assert hub.repositories == {}


def test_what_an_earlier_run_left_on_the_hub_is_no_part_of_this_one(hub: LoopbackHub, tmp_path: Path) -> None:
    trainer = make(tmp_path, hub_strategy="end")
    trainer.train()
    trainer.push_to_hub(tags=["mine"])
    others = tmp_path / "others"
    others.mkdir()
    for name in ("tokenizer.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (others / name).write_text("{}")
    push_folder(others, Destination("user/model"), message="Others")
    publishing.publish(trainer.nio_init_dir, Destination("user/model"))
    found = files(hub)
    gone = {"trainer_state.json", "plots/training.png", "model.safetensors.index.json"}
    assert not gone & found.keys()
    assert "model-00001-of-00002.safetensors" not in found
    assert {"tokenizer.json", "model.safetensors", "plots/nio_scales.png"} <= found.keys()
    card = ModelCard(found[CARD_NAME].decode())
    assert "not a trained model" in card.text
    assert "mine" in card.data.tags


def test_a_background_push_that_fails_says_so(
    hub: LoopbackHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path, hub_strategy="end")
    trainer.train()
    hub.fail("POST /api/models/*/commit/*", status=403, times=None)
    with caplog.at_level(logging.ERROR, logger="nio_hf"), pytest.raises(HubError):
        trainer.push_to_hub(blocking=False).result(60)
    # The thread hands over the error before it logs it; its next job begins behind both.
    trainer._in_background(lambda: None).result(60)
    assert "The model is saved, but not pushed." in caplog.text
    assert "nio-hf push" in caplog.text


def test_what_a_killed_training_had_set_aside_is_removed(hub: LoopbackHub, tmp_path: Path) -> None:
    left = tmp_path / "_nio_push" / "checkpoint-1"
    left.mkdir(parents=True)
    make(tmp_path, hub_strategy="end").train()
    assert not left.exists()
