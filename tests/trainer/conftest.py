"""What tests of the Trainer start from."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_collection() -> Iterator[None]:
    """Trainer collects garbage often; what is imported takes it half a second to go through, and is none."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
