"""The push: bit-equal, at once or not at all, tried again, and an error that says how to go on."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest

from nio_hf.errors import HubError, OutputError
from nio_hf.hub import Destination, push_folder
from nio_hf.hub.push import files_to_push, push_command
from tests.hub.loopback import LoopbackHub

HERE = Destination("user/model")
QUICK = (0.01, 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "model.safetensors": b"weights",
        "config.json": b"{}",
        "plots/nio.png": b"png",
        "training_args.bin": b"hf_secret",
        "nio_manifest.json": b"{}",
        "_nio_init/model.safetensors": b"no",
        "_nio_lock": b"",
        "checkpoint-1/model.safetensors": b"no",
        ".cache/x": b"no",
        "wandb/run.log": b"no",
    }
    for name, content in files.items():
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "run"


def push(folder: Path, destination: Destination = HERE, **options: Any) -> Any:
    return push_folder(folder, destination, **{"message": "Push", "waits": QUICK, **options})


def pushed(hub: LoopbackHub, revision: str = "main") -> dict[str, bytes]:
    files = hub.repositories["user/model"].files(revision)
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def test_files_arrive_bit_for_bit_without_what_is_private(hub: LoopbackHub, folder: Path) -> None:
    commit = push(folder)
    assert pushed(hub) == {"model.safetensors": b"weights", "config.json": b"{}", "plots/nio.png": b"png"}
    assert sorted(pushed(hub)) == files_to_push(folder)
    assert commit.repo_url.repo_id == "user/model"
    assert not hub.repositories["user/model"].private


def test_a_second_push_sends_what_has_changed_in_one_commit(hub: LoopbackHub, folder: Path) -> None:
    push(folder)
    (folder / "config.json").write_text('{"a": 1}')
    hub.calls.clear()
    push(folder, message="Again")
    assert pushed(hub)["config.json"] == b'{"a": 1}'
    assert hub.repositories["user/model"].commits[-1].title == "Again"
    assert not [call for call in hub.calls if call.method == "PUT"], "the weights are there already"


def test_private_revision_and_path(hub: LoopbackHub, folder: Path) -> None:
    push(folder, Destination("user/model", private=True, revision="v1"), path_in_repo="last-checkpoint")
    assert hub.repositories["user/model"].private
    assert "last-checkpoint/model.safetensors" in pushed(hub, "v1")
    assert pushed(hub) == {}


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        *(("POST /api/repos/create", status) for status in (500, 503, 429)),
        *(("POST /api/models/*/commit/*", status) for status in (500, 503, 429, 409, 412)),
    ],
)
def test_what_passes_is_tried_again(
    hub: LoopbackHub, folder: Path, caplog: pytest.LogCaptureFixture, request_: str, status: int
) -> None:
    hub.fail(request_, status=status, times=1)
    with caplog.at_level(logging.WARNING, logger="nio_hf"):
        push(folder)
    assert pushed(hub)["model.safetensors"] == b"weights"
    assert "Push to user/model, try 1 of 3" in caplog.text
    assert [commit.title for commit in hub.repositories["user/model"].commits].count("Push") == 1


@pytest.mark.parametrize("request_", ["PUT /_lfs/*", "POST /api/models/*/commit/*", "POST /api/models/*/preupload/*"])
def test_a_dropped_connection_is_tried_again(hub: LoopbackHub, folder: Path, request_: str) -> None:
    hub.drop(request_, times=1)
    push(folder)
    assert pushed(hub)["model.safetensors"] == b"weights"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_does_not_pass_is_said_at_once(hub: LoopbackHub, folder: Path, status: int) -> None:
    hub.fail("POST /api/models/*/commit/*", status=status, times=None)
    started = time.monotonic()
    with pytest.raises(HubError) as caught:
        push(folder, waits=(60,))
    assert time.monotonic() - started < 30
    said = {401: "the token is not valid", 403: "no permission to write there", 404: "not found"}[status]
    assert said in str(caught.value)
    assert f"{folder} is whole; push it later: nio-hf push {folder} user/model" in str(caught.value)
    assert pushed(hub) == {}


def test_in_the_end_it_is_an_error_with_the_command_that_goes_on(hub: LoopbackHub, folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.fail("POST /api/models/*/commit/*", status=503, times=None)
    with pytest.raises(HubError, match="push it later: nio-hf push"):
        push(folder, Destination("user/model", private=True, revision="v1"))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert sum("commit" in call.path for call in hub.calls) >= 1 + len(QUICK)
    hub.clear()
    push(folder, Destination("user/model", private=True, revision="v1"))
    assert pushed(hub, "v1")["config.json"] == b"{}"


def test_no_token_at_the_push(hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"user/model: .*(no token|not valid).*push it later"):
        push(folder)


def test_a_folder_without_files_is_no_fault_of_the_hub(hub: LoopbackHub, folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "nowhere.json")
    assert "config.json" not in files_to_push(folder)
    with pytest.raises(OutputError, match="no file to push"):
        push(folder / "nowhere")


def test_the_command_can_be_pasted() -> None:
    destination = Destination("user/model", private=True, revision="v 1")
    command = push_command(Path("my run"), destination, license="mit", tag=["a", "b"], commit_message=None)
    assert command == "nio-hf push 'my run' user/model --private --revision 'v 1' --license mit --tag a --tag b"


def test_a_name_without_namespace_is_pushed_where_the_hub_puts_it(hub: LoopbackHub, folder: Path) -> None:
    push(folder, Destination("model"))
    assert pushed(hub)["config.json"] == b"{}"


def test_files_can_be_replaced_on_their_way(hub: LoopbackHub, folder: Path) -> None:
    push(folder, replaced={"config.json": b"other", "nowhere.json": b"no"})
    assert pushed(hub)["config.json"] == b"other"
    assert "nowhere.json" not in pushed(hub)
    assert (folder / "config.json").read_bytes() == b"{}"


def test_an_interrupt_says_how_to_go_on(
    hub: LoopbackHub, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fail("POST /api/models/*/commit/*", status=503, times=None)

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupted)
    with caplog.at_level(logging.WARNING, logger="nio_hf"), pytest.raises(KeyboardInterrupt):
        push(folder)
    assert f"{folder} is whole. Push it later: nio-hf push {folder} user/model" in caplog.text
