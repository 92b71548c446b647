"""What the comparison starts from."""

import gc
import os

import pytest
import torch


@pytest.fixture(autouse=True)
def quick_collection(monkeypatch):
    """Trainer collects garbage when a training begins, which takes as long as a training of these."""
    monkeypatch.setattr(gc, "collect", lambda generation=2: 0)


@pytest.fixture(autouse=True)
def undo_determinism():
    """`full_determinism` asks torch and the environment for it, which would last."""
    environment = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(False)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
