"""Models that methods are defined for."""

from __future__ import annotations

OF_TRANSFORMERS = ("range", "mimetic", "structured")
"""Methods that refuse a plain network."""


def home(method: str) -> str:
    """A small model that a method is defined for."""
    return "vit" if method in OF_TRANSFORMERS else "mlp"
