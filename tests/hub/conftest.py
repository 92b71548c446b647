"""A loopback Hub, and the client of this process pointed at it."""

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi

from nio_hf.hub import push
from tests.hub.loopback import LoopbackHub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine, to which the user is logged in with write permission."""
    with LoopbackHub() as loopback:
        client = HfApi(endpoint=loopback.endpoint)
        monkeypatch.setattr(push, "hub", lambda: client)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        yield loopback
