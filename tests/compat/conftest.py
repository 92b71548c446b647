"""What the comparison starts from."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Trainer collects garbage often; what is imported takes it half a second to go through, and is none."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def undo_determinism() -> Iterator[None]:
    """`full_determinism` asks torch and the environment for it, which would last."""
    environment = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(False)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
