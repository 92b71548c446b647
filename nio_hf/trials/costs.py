"""What an initialisation may cost, known before a trial begins."""

from __future__ import annotations

import dataclasses
from typing import Any

from nio_hf.core import NIO, expected_cost
from nio_hf.trainer import NIOTrainingArguments
from nio_hf.trainer.methods import METHODS
from nio_hf.trainer.race import MOST_CANDIDATES

MANY_GROUPS = 8
"""Number of groups that the cost beforehand counts with, where there may be more than one."""


def is_free(args: NIOTrainingArguments) -> bool:
    """Whether a method looks at no data. Its reports are for the reader, and a trial does not pay for them.

    NIO is not free: it judges its scales by the report batches.
    """
    method = METHODS[args.nio_method]
    return method is not NIO and method.batches(args.to_nio_config(), method.checked(args.nio_method_options)) == 0


def most_steps(args: NIOTrainingArguments, groups: Any = None) -> float | None:
    """Training steps that a trial pays for an initialisation at most, reports included; None where that is not known.

    Args:
        args: settings of the training.
        groups: value of `nio_groups`; None for that of the settings.
    """
    if not args.nio:
        return 0.0
    raced = float(MOST_CANDIDATES * (args.nio_race_steps or 0))
    if is_free(args):
        return raced
    config = args.to_nio_config()
    config = config if groups is None else dataclasses.replace(config, groups=groups)
    number = 1 if config.groups == "model" else MANY_GROUPS
    batches = expected_cost(config, number, METHODS[args.nio_method], args.nio_method_options)
    samples = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return None if batches is None else raced + batches * args.nio_batch_size / samples
