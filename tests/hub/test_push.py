"""Pushes: checks beforehand, equal bits, one commit or none, retries, and errors that say how to go on."""

import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from nio_hf.errors import HubError, OutputError
from nio_hf.hub import Destination, check_destination
from nio_hf.hub import push as pushing
from nio_hf.hub.push import push_command, push_folder
from tests.durable.trainings import failing
from tests.hub.loopback import Repository

HERE = Destination("user/model")
PRIVATE = Destination("user/model", private=True, revision="v1")
QUICK = (0.01, 0.01)
COMMIT = "POST /api/models/*/commit/*"


@pytest.fixture
def folder(tmp_path):
    kept_here = ("training_args.bin", "nio_manifest.json", "_nio_init/a", "checkpoint-1/a", ".cache/x", "wandb/run.log")
    files = {"model.safetensors": b"weights", "config.json": b"{}", "plots/nio.png": b"png", "optimizer.pt": b"state"}
    for name, content in (files | dict.fromkeys(kept_here, b"no")).items():
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "run"


def push(folder, destination=HERE, **options):
    return push_folder(folder, destination, **{"message": "Push", "waits": QUICK, **options})


def pushed(hub, revision="main"):
    files = hub.repositories["user/model"].files(revision)
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def refused(repo_id="user/model", **fields):
    with pytest.raises(HubError) as caught:
        check_destination(Destination(repo_id, **fields))
    return str(caught.value)


def test_a_name_without_namespace_is_the_users(hub):
    assert check_destination(Destination("model")).repo_id == "user/model"
    assert check_destination(Destination("lab/model")).repo_id == "lab/model"
    assert hub.repositories == {}, "nothing is changed by a check"


@pytest.mark.parametrize("name", ["a/b/c", "user/bad name", "user/model.git", "", "user/" + "x" * 100])
def test_names_that_are_not_valid(hub, name):
    message = refused(name)
    assert f"the repository {name!r}" in message
    assert "Give USER/NAME" in message
    assert hub.calls == [], "no need to ask the Hub"


@pytest.mark.parametrize(
    ("repo_id", "token", "said"),
    [
        ("user/model", "hf_wrong", "the token is not valid"),
        ("user/model", "hf_read", "the token of user may only read. Make one with write permission"),
        ("stranger/model", "hf_write", "user may not write into the namespace 'stranger'. Choose one of: lab, user"),
        ("readers/model", "hf_write", "user may not write into the namespace 'readers'. Choose one of: lab, user"),
        ("lab/there", "hf_fine", "no permission to write there"),
    ],
)
def test_who_may_not_write_is_told_why(hub, repo_id, token, said):
    hub.repositories["lab/there"] = Repository("lab/there", private=False)
    message = refused(repo_id, token=token)
    assert said in message
    assert token not in message
    assert token not in repr(Destination(repo_id, token=token))


def test_no_token(hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    message = refused()
    assert message.startswith("user/model: no token to push with. Log in with `hf auth login`, or set HF_TOKEN")
    assert "nio-hf push" in message
    with pytest.raises(HubError, match=r"user/model: .*(no token|not valid).*push it later"):
        push(folder)


def test_a_public_repository_is_no_place_for_a_private_push(hub):
    for name, private in (("user/open", False), ("user/closed", True)):
        hub.repositories[name] = Repository(name, private=private)
    assert "exists and is public" in refused("user/open", private=True)
    assert check_destination(Destination("user/closed", private=True)).repo_id == "user/closed"


@pytest.mark.parametrize("status", [503, 429, None])
def test_a_hub_that_does_not_answer_is_left_to_the_push(hub, caplog, monkeypatch, status):
    if status is None:
        client = HfApi(endpoint="http://127.0.0.1:9", token="hf_write")
        monkeypatch.setattr(pushing, "hub", lambda: client)
    else:
        hub.fail("GET /api/whoami-v2", status=status, times=None)
    assert check_destination(HERE) == HERE
    assert "The Hub does not answer" in caplog.text
    assert "user/model is not checked" in caplog.text


def test_offline_mode_is_said_at_once(hub, monkeypatch):
    monkeypatch.setattr(HfApi, "whoami", failing(OfflineModeIsEnabled("offline")))
    assert "HF_HUB_OFFLINE is set" in refused()


def test_files_arrive_bit_for_bit_without_what_is_private(hub, folder):
    commit = push(folder, Destination("model"))
    assert pushed(hub) == {"model.safetensors": b"weights", "config.json": b"{}", "plots/nio.png": b"png"}
    assert commit.repo_url.repo_id == "user/model"
    assert not hub.repositories["user/model"].private


def test_a_second_push_sends_what_has_changed_in_one_commit(hub, folder):
    push(folder)
    (folder / "config.json").write_text('{"a": 1}')
    hub.calls.clear()
    push(folder, message="Again")
    assert pushed(hub)["config.json"] == b'{"a": 1}'
    assert hub.repositories["user/model"].commits[-1].title == "Again"
    assert not [call for call in hub.calls if call.method == "PUT"], "the weights are there already"


def test_a_checkpoint_is_pushed_whole_into_its_folder_of_a_private_branch(hub, folder):
    push(folder, PRIVATE, path_in_repo="last-checkpoint")
    assert hub.repositories["user/model"].private
    assert {"last-checkpoint/model.safetensors", "last-checkpoint/optimizer.pt"} <= pushed(hub, "v1").keys()
    assert pushed(hub) == {}


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ("POST /api/repos/create", 500),
        *((COMMIT, status) for status in (503, 429, 409, 412)),
        *((request, None) for request in ("PUT /_lfs/*", COMMIT, "POST /api/models/*/preupload/*")),
    ],
)
def test_what_passes_is_tried_again(hub, folder, caplog, request_, status):
    """Without a status the connection is dropped, which huggingface_hub may try again by itself."""
    if status is None:
        hub.drop(request_)
    else:
        hub.fail(request_, status=status)
    push(folder)
    assert pushed(hub)["model.safetensors"] == b"weights"
    assert status is None or "Push to user/model, try 1 of 3" in caplog.text
    assert [commit.title for commit in hub.repositories["user/model"].commits].count("Push") == 1


@pytest.mark.parametrize(
    ("status", "said"), [(401, "the token is not valid"), (403, "no permission to write there"), (404, "not found")]
)
def test_what_does_not_pass_is_said_at_once(hub, folder, status, said):
    hub.fail(COMMIT, status=status, times=None)
    started = time.monotonic()
    with pytest.raises(HubError) as caught:
        push(folder, waits=(60,))
    assert time.monotonic() - started < 30
    assert said in str(caught.value)
    assert f"{folder} is whole; push it later: nio-hf push {folder} user/model" in str(caught.value)
    assert pushed(hub) == {}


def test_in_the_end_it_is_an_error_with_the_command_that_goes_on(hub, folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.fail(COMMIT, status=503, times=None)
    with pytest.raises(HubError, match=r"push it later: nio-hf push .* user/model --private --revision v1"):
        push(folder, PRIVATE)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert sum("commit" in call.path for call in hub.calls) >= 1 + len(QUICK)
    hub.clear()
    push(folder, PRIVATE)
    assert pushed(hub, "v1")["config.json"] == b"{}"


def test_a_folder_without_files_is_no_fault_of_the_hub(hub, folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "nowhere.json")
    push(folder)
    assert "config.json" not in pushed(hub)
    with pytest.raises(OutputError, match="no file to push"):
        push(folder / "nowhere")


def test_the_command_can_be_pasted():
    destination = Destination("user/model", private=True, revision="v 1")
    command = push_command(Path("my run"), destination, license="mit", tag=["a", "b"], commit_message=None)
    assert command == "nio-hf push 'my run' user/model --private --revision 'v 1' --license mit --tag a --tag b"


def test_an_interrupt_says_how_to_go_on(hub, folder, caplog, monkeypatch):
    hub.fail(COMMIT, status=503, times=None)
    monkeypatch.setattr(time, "sleep", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        push(folder)
    assert f"{folder} is whole. Push it later: nio-hf push {folder} user/model" in caplog.text
