"""What the comparison starts from."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def collection() -> Iterator[None]:
    """What the tests keep from the garbage collector is given back to it."""
    yield
    gc.unfreeze()
    gc.collect()


@pytest.fixture(autouse=True)
def undo_determinism() -> Iterator[None]:
    """`full_determinism` asks torch and the environment for it, which would last."""
    environment = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(False)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
