"""What every test starts from."""

from __future__ import annotations

import pytest

from nio_hf.core import scales


@pytest.fixture(autouse=True)
def layer_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer types that a test registers are forgotten after it."""
    monkeypatch.setattr(scales, "_GRADIENT_MODULES", dict(scales._GRADIENT_MODULES))
