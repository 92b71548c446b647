"""What is found out about a push before anything is computed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from nio_hf.errors import HubError
from nio_hf.hub import Destination, access, check_destination
from tests.hub.loopback import LoopbackHub, Repository


def refused(repo_id: str = "user/model", **fields: Any) -> str:
    with pytest.raises(HubError) as caught:
        check_destination(Destination(repo_id, **fields))
    return str(caught.value)


def test_a_name_without_namespace_is_the_users(hub: LoopbackHub) -> None:
    assert check_destination(Destination("model")).repo_id == "user/model"
    assert check_destination(Destination("lab/model")).repo_id == "lab/model"
    assert hub.repositories == {}, "nothing is changed by a check"


@pytest.mark.parametrize("name", ["a/b/c", "user/bad name", "user/-model", "user/model.git", "", "user/" + "x" * 100])
def test_names_that_are_not_valid(hub: LoopbackHub, name: str) -> None:
    message = refused(name)
    assert f"the repository {name!r}" in message
    assert "Give USER/NAME" in message
    assert hub.calls == [], "no need to ask the Hub"


def test_no_token(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    message = refused()
    assert message.startswith("user/model: no token to push with. Log in with `hf auth login`, or set HF_TOKEN")
    assert "nio-hf push" in message


def test_a_wrong_token(hub: LoopbackHub) -> None:
    message = refused(token="hf_wrong")
    assert "the token is not valid" in message
    assert "hf auth login" in message
    assert "hf_wrong" not in message


def test_a_token_that_may_only_read(hub: LoopbackHub) -> None:
    assert "the token of user may only read. Make one with write permission" in refused(token="hf_read")


def test_a_namespace_that_is_not_yours(hub: LoopbackHub) -> None:
    for namespace in ("stranger", "readers"):
        message = refused(f"{namespace}/model")
        assert f"user may not write into the namespace '{namespace}'. Choose one of: lab, user" in message


def test_a_fine_grained_token_may_write_where_it_may(hub: LoopbackHub) -> None:
    assert check_destination(Destination("user/model", token="hf_fine")).repo_id == "user/model"
    hub.repositories["lab/model"] = Repository("lab/model", private=False)
    assert "no permission to write there" in refused("lab/model", token="hf_fine")


def test_a_public_repository_is_no_place_for_a_private_push(hub: LoopbackHub) -> None:
    hub.repositories["user/open"] = Repository("user/open", private=False)
    hub.repositories["user/closed"] = Repository("user/closed", private=True)
    assert "exists and is public" in refused("user/open", private=True)
    assert check_destination(Destination("user/closed", private=True)).repo_id == "user/closed"


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_that_does_not_answer_is_left_to_the_push(
    hub: LoopbackHub, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    hub.fail("GET /api/whoami-v2", status=status, times=None)
    with caplog.at_level(logging.WARNING, logger="nio_hf"):
        assert check_destination(Destination("user/model")) == Destination("user/model")
    assert "The Hub does not answer" in caplog.text


def test_a_network_that_is_down_is_left_to_the_push(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = HfApi(endpoint="http://127.0.0.1:9", token="hf_write")
    monkeypatch.setattr(access, "hub", lambda: client)
    with caplog.at_level(logging.WARNING, logger="nio_hf"):
        check_destination(Destination("user/model"))
    assert "The Hub does not answer" in caplog.text
    assert "user/model is not checked" in caplog.text


def test_offline_mode_is_said_at_once(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    class Offline:
        def whoami(self, **kwargs: Any) -> None:
            raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr(access, "hub", Offline)
    assert "HF_HUB_OFFLINE is set" in refused()


def test_the_token_is_not_shown() -> None:
    assert "hf_secret" not in repr(Destination("user/model", token="hf_secret"))
