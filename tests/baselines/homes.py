"""Models that methods are defined for."""

OF_TRANSFORMERS = ("range", "mimetic", "structured")
"""Methods that refuse a plain network."""


def home(method):
    """A small model that a method is defined for."""
    return "vit" if method in OF_TRANSFORMERS else "mlp"
