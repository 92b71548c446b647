"""Whether the settings of a recipe are in range."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from nio_hf.errors import Problem
from nio_hf.recipe.strict_yaml import Setting

_Rule = tuple[Callable[[Any], bool], str]


def _share(value: float) -> bool:
    return 0 <= value <= 1


def _positive(value: float) -> bool:
    return value > 0 and math.isfinite(value)


def _not_negative(value: float) -> bool:
    return value >= 0 and math.isfinite(value)


def _range_of(allowed: Callable[[float], bool]) -> Callable[[list[float]], bool]:
    return lambda pair: len(pair) == 2 and all(map(allowed, pair)) and pair[0] <= pair[1]


_PROBABILITY: _Rule = (_share, "Give a number in [0, 1]")
_COUNT: _Rule = (_positive, "Give a whole number of at least 1")
_STRENGTH: _Rule = (_not_negative, "Give a finite number of at least 0")
_CHANNELS: _Rule = (lambda values: len(values) == 3, "Give three numbers, one for each of red, green and blue")

_SEED: _Rule = (lambda value: 0 <= value < 2**32, "Give a whole number in [0, 2^32)")

_RULES: dict[str, _Rule] = {
    "image_size": _COUNT,
    "image_mean": _CHANNELS,
    "image_std": (
        lambda values: len(values) == 3 and all(map(_positive, values)),
        "Give three numbers above 0, one for each of red, green and blue",
    ),
    "crop_ratio": (lambda value: 0 < value <= 1, "Give a number in (0, 1]"),
    "drop_path_rate": (lambda value: 0 <= value < 1, "Give a number in [0, 1)"),
    "shuffle_buffer_size": _COUNT,
    "num_classes": (lambda value: value > 1, "Give a whole number of at least 2"),
    "max_train_samples": _COUNT,
    "max_eval_samples": _COUNT,
    "crop_scale": (_range_of(lambda value: 0 < value <= 1), "Give two rising numbers in (0, 1]"),
    "crop_aspect": (_range_of(_positive), "Give two rising numbers above 0"),
    "crop_padding": _COUNT,
    "horizontal_flip": _PROBABILITY,
    "randaugment_magnitude": (lambda value: 0 <= value <= 10, "Give a number in [0, 10], or null for no RandAugment"),
    "randaugment_magnitude_std": _STRENGTH,
    "randaugment_layers": _COUNT,
    "randaugment_prob": _PROBABILITY,
    "color_jitter": _PROBABILITY,
    "random_erasing": _PROBABILITY,
    "mixup_alpha": _STRENGTH,
    "cutmix_alpha": _STRENGTH,
    "mix_prob": _PROBABILITY,
    "mix_switch_prob": _PROBABILITY,
    "repeated_augmentation": _COUNT,
    "global_batch_size": _COUNT,
    "eval_fraction": (lambda value: 0 < value < 1, "Give a number in (0, 1)"),
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "num_train_epochs": (_positive, "Give a number above 0"),
    "dataloader_num_workers": (_not_negative, "Give a whole number of at least 0"),
    "learning_rate": _STRENGTH,
    "weight_decay": _STRENGTH,
    "warmup_steps": _STRENGTH,
    "max_grad_norm": _STRENGTH,
    "adam_beta1": (lambda value: 0 <= value < 1, "Give a number in [0, 1)"),
    "adam_beta2": (lambda value: 0 <= value < 1, "Give a number in [0, 1)"),
    "adam_epsilon": _STRENGTH,
    "label_smoothing_factor": (lambda value: 0 <= value < 1, "Give a number in [0, 1)"),
    "seed": _SEED,
    "data_seed": _SEED,
    "nio_seed": _SEED,
    "block_size": (lambda value: value >= 2, "Give a whole number of at least 2"),
    "mlm_probability": (lambda value: 0 < value < 1, "Give a number in (0, 1)"),
    "num_proc": _COUNT,
    "ema_decay": (lambda value: 0 < value < 1, "Give a number in (0, 1), or null for no average"),
}


def range_problems(values: dict[str, Any], settings: dict[str, Setting]) -> Iterator[Problem]:
    """The problems of values that are out of range.

    Args:
        values: of the right types, by key.
        settings: where each of them was written.
    """
    for key, value in values.items():
        allowed, advice = _RULES.get(key, (lambda _: True, ""))
        if value is not None and not allowed(value):
            yield Problem(settings[key].where, f"{value!r}", advice)
