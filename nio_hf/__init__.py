"""Neural Initialization Optimization (NIO) for Hugging Face Transformers.

NIO finds the factors by which to scale the weights before training (Yang et al., NeurIPS 2022, arXiv 2210.05956).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nio_hf.core import GradCosine, NIOConfig, NIOResult, grad_cosine, initialize
    from nio_hf.trainer import NIOTrainer, NIOTrainerMixin, NIOTrainingArguments

__version__ = "0.1.0"

__all__ = [
    "GradCosine",
    "NIOConfig",
    "NIOResult",
    "NIOTrainer",
    "NIOTrainerMixin",
    "NIOTrainingArguments",
    "grad_cosine",
    "initialize",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "nio_hf.trainer" if name.startswith("NIOTrain") else "nio_hf.core"
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
