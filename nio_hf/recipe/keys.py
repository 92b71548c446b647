"""Everything that a recipe can set: keys with their types and ranges."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Annotated, Any

from annotated_types import Interval

from nio_hf.recipe.settings import (
    AugmentationSettings,
    Count,
    DataSettings,
    ModelSettings,
    NotNegative,
    OptimizationSettings,
    Positive,
    Seed,
    ShareBelowOne,
    TextSettings,
)
from nio_hf.trainer import NIOTrainingArguments

GROUPS: tuple[type, ...] = (
    *(ModelSettings, DataSettings, TextSettings, AugmentationSettings, OptimizationSettings),
    NIOTrainingArguments,
)
"""Classes that the settings of a recipe are fields of."""
_RANGES: dict[str, Any] = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), Count
    ),
    **dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "adam_epsilon"), NotNegative),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), ShareBelowOne),
    "num_train_epochs": Positive,
    "dataloader_num_workers": Annotated[int, Interval(ge=0)],
    "seed": Seed,
    **dict.fromkeys(("data_seed", "nio_seed"), Seed | None),
}
"""Types of training arguments with a range."""


@functools.cache
def known_keys() -> dict[str, tuple[type, Any]]:
    """{key: (its class, its annotation)} of everything that a recipe can set."""
    keys: dict[str, tuple[type, Any]] = {}
    for group in GROUPS:
        hints = typing.get_type_hints(group, include_extras=True) | (_RANGES if group is NIOTrainingArguments else {})
        keys |= {field.name: (group, hints[field.name]) for field in dataclasses.fields(group) if field.init}
    return keys
