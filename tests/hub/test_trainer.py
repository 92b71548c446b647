"""Pushes of the Trainer: their content and order, and a training that survives their failures."""

import socket
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from nio_hf.errors import ConfigError, HubError
from nio_hf.hub import Destination
from nio_hf.hub import trainer as publishing
from nio_hf.hub.card import MARKER
from nio_hf.hub.push import CARD_NAME, push_folder
from nio_hf.trainer.checkpoints import MARK_KEY
from tests.trainer.toys import At, ToyImages, same_weights, trainer_of

SAVING = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}


def make(output_dir, **changes):
    settings = {"push_to_hub": True, "hub_model_id": "user/model", "eval_dataset": ToyImages()}
    return trainer_of(output_dir, **{**settings, **changes})


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(publishing, "_ONE_MORE_TRY", (0.01,))
    monkeypatch.setattr(
        "nio_hf.hub.trainer.publish.__kwdefaults__", {**publishing.publish.__kwdefaults__, "waits": (0.01,)}
    )


def files(hub, revision="main"):
    return hub.repositories["user/model"].files(revision)


def test_checkpoints_are_pushed_in_their_order_and_the_model_last(hub, tmp_path):
    left = tmp_path / "_nio_push" / "checkpoint-1"
    left.mkdir(parents=True)
    hub.delay("POST /api/models/*/preupload/*", seconds=1, times=2)
    keeping = {"hub_strategy": "every_save", "hub_always_push": True, "save_total_limit": 1}
    trainer = make(tmp_path, hub_token="hf_write", **keeping, **SAVING)
    assert hub.repositories == {}, "nothing is made before there is something to push"
    checked = []
    trainer.add_callback(At("on_train_begin", lambda: checked.append(left.exists())))
    trainer.train()
    trainer.push_to_hub()
    assert checked == [False], "what a killed training had set aside is removed"
    found = files(hub)
    assert found["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()
    assert {"config.json", "nio_state.json", "nio_run.json", CARD_NAME, "plots/nio_scales.png"} <= found.keys()
    assert not [n for n in found if n.endswith((".bin", ".pt", ".pth")) or n.startswith(("_", "checkpoint"))]
    assert not [name for name, content in found.items() if b"hf_write" in content]
    titles = [commit.title for commit in hub.repositories["user/model"].commits[1:]]
    assert titles == [*(f"Training in progress, step {number}" for number in (1, 2, 3)), "Trained for 3 steps"]
    assert not (tmp_path / "_nio_push").exists()


def test_a_pushed_checkpoint_can_be_resumed_from_and_names_no_path(hub, tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make(tmp_path / "first", hub_strategy="all_checkpoints", hub_always_push=True, **best, **SAVING)
    # Trackers of experiments name their files after the machine.
    log = tmp_path / "first" / "runs" / f"now_{socket.gethostname()}" / f"events.{socket.gethostname()}"
    log.parent.mkdir(parents=True)
    log.touch()
    trainer.train()
    trainer.push_to_hub()
    for name, content in files(hub).items():
        assert str(tmp_path).encode() not in content, name
        assert socket.gethostname() not in name
    assert str(tmp_path) in (tmp_path / "first" / "trainer_state.json").read_text(), "here it stays"
    pushed = {name: content for name, content in files(hub).items() if name.startswith("checkpoint-3/")}
    assert {"checkpoint-3/optimizer.pt", "checkpoint-3/trainer_state.json"} <= pushed.keys()
    for name, content in pushed.items():
        (tmp_path / "second" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "second" / name).write_bytes(content)
    further = make(tmp_path / "second", push_to_hub=False, **{**SAVING, "max_steps": 4})
    further.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-3"))
    assert further.state.global_step == 4
    publishing.publish(tmp_path / "first" / "checkpoint-2", Destination("user/by-hand"))
    found = hub.repositories["user/by-hand"].files()
    assert {"model.safetensors", "nio_state.json", "trainer_state.json", "plots/training.png"} <= found.keys()
    assert not [name for name in found if name.endswith((".bin", ".pt", ".pth"))]
    assert "not finished: step 2 of 3" in found[CARD_NAME].decode()


@pytest.mark.parametrize("fault", ["the token", "the network"])
def test_what_cannot_be_pushed_is_refused_at_the_start_and_a_hub_that_is_down_is_asked_again(
    hub, tmp_path, caplog, fault
):
    if fault == "the token":
        with pytest.raises(HubError):
            make(tmp_path, hub_token="hf_read")
        return
    hub.fail("* /api/*", status=503, times=None)
    trainer = make(tmp_path, hub_strategy="end")
    assert "The Hub does not answer" in caplog.text
    hub.clear()
    trainer.run_nio()
    trainer.push_to_hub()
    assert "model.safetensors" in files(hub)
    (trainer.nio_init_dir / "more.txt").touch()
    hub.fail("POST /api/models/*/commit/*", status=403, times=None)
    with pytest.raises(HubError):
        trainer.push_to_hub(blocking=False).result(60)
    assert "The model is saved, but not pushed." in caplog.text
    assert "nio-hf push" in caplog.text


def test_before_the_training_it_is_the_initialised_checkpoint(hub, tmp_path):
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


def test_a_push_in_the_background_and_to_a_branch(hub, tmp_path):
    trainer = make(tmp_path, hub_strategy="end")
    trainer.train()
    future = trainer.push_to_hub("My words", blocking=False, revision="v1")
    assert future.result(60).commit_url
    assert "model.safetensors" in files(hub, "v1")
    assert "model.safetensors" not in files(hub)
    assert hub.repositories["user/model"].commits[-1].title == "My words"


def test_no_push_that_fails_ends_or_changes_a_training(hub, tmp_path, caplog):
    plain = make(tmp_path / "plain", push_to_hub=False, **SAVING)
    plain.train()
    trainer = make(tmp_path / "pushed", hub_always_push=True, **SAVING)
    hub.fail("POST /api/models/*/commit/*", status=503, times=None)
    trainer.train()
    trainer._finish_current_push()
    trainer.save_model()
    assert same_weights(plain, trainer)
    assert "is not pushed; the training goes on" in caplog.text
    assert "The model is saved, but not pushed." in caplog.text
    assert (tmp_path / "pushed" / "checkpoint-3" / "nio_manifest.json").is_file()
    with pytest.raises(HubError, match=r"push it later: nio-hf push .* user/model"):
        trainer.push_to_hub()
    hub.clear()
    trainer.push_to_hub()
    assert "model.safetensors" in files(hub)


@pytest.mark.parametrize("fault", ["drop", "fail"])
def test_your_own_card_survives_a_fault_of_the_hub(hub, tmp_path, fault):
    trainer = make(tmp_path, hub_strategy="end")
    trainer.train()
    trainer.push_to_hub()
    own = Path(tmp_path / CARD_NAME).read_text().replace(MARKER, "Mine.")
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / CARD_NAME).write_text(own)
    push_folder(folder, Destination("user/model"), "My card")
    if fault == "drop":
        hub.drop("* */resolve/*/README.md", times=1)
    else:
        hub.fail("* */resolve/*/README.md", status=500, times=1)
    trainer.push_to_hub()
    assert files(hub)[CARD_NAME].decode() == own
    trainer.push_to_hub(revision="v2")
    assert files(hub, "v2")[CARD_NAME].decode() == own


def test_what_an_earlier_run_left_on_the_hub_is_no_part_of_this_one(hub, tmp_path):
    trainer = make(tmp_path, hub_strategy="end")
    trainer.train()
    trainer.push_to_hub(tags=["mine"])
    others = tmp_path / "others"
    others.mkdir()
    own = {"tokenizer.json", "model_v1/adapter.safetensors", "models/old/weights.safetensors"}
    for name in (*own, "model-00001-of-00002.safetensors", "model.safetensors.index.json", "ema/model.safetensors"):
        (others / name).parent.mkdir(parents=True, exist_ok=True)
        (others / name).write_text("{}")
    push_folder(others, Destination("user/model"), "Others")
    publishing.publish(trainer.nio_init_dir, Destination("user/model"))
    found = files(hub)
    gone = {"trainer_state.json", "plots/training.png", "model.safetensors.index.json", "ema/model.safetensors"}
    assert not gone & found.keys()
    assert "model-00001-of-00002.safetensors" not in found
    assert {*own, "model.safetensors", "plots/nio_scales.png"} <= found.keys()
    card = ModelCard(found[CARD_NAME].decode())
    assert "not a trained model" in card.text
    assert "mine" in card.data.tags
