"""Whether the optimiser and the schedule of a recipe can be built, tried on a parameter of one number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer, get_scheduler

from nio_hf.errors import Problem, one_line
from nio_hf.recipe.strict_yaml import Setting
from nio_hf.trainer import NIOTrainingArguments

_STEPS = 100


def optimizer_problems(training: NIOTrainingArguments, settings: dict[str, Setting], path: Path) -> Iterator[Problem]:
    """What is wrong with the optimiser or the schedule, which Trainer builds only after NIO has run."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training)
        optimizer_class([parameter], **options)
    except ImportError as error:
        fix = "Install it, or choose another optim"
        yield Problem(_where(("optim",), settings, path), one_line(error), fix)
        return
    except Exception as error:  # whatever the libraries of optimisers raise
        yield Problem(_where(("optim_args", "optim"), settings, path), one_line(error), "Correct it, or optim")
        return
    try:
        get_scheduler(
            training.lr_scheduler_type,
            optimizer=torch.optim.SGD([parameter], lr=training.learning_rate),
            num_warmup_steps=training.get_warmup_steps(_STEPS),
            num_training_steps=_STEPS,
            scheduler_specific_kwargs=cast("dict[str, Any]", training.lr_scheduler_kwargs or {}),
        )
    except Exception as error:  # likewise
        keys = ("lr_scheduler_kwargs", "lr_scheduler_type")
        yield Problem(_where(keys, settings, path), one_line(error), "Correct it for that lr_scheduler_type")


def _where(keys: tuple[str, ...], settings: dict[str, Setting], path: Path) -> str:
    return next((settings[key].where for key in keys if key in settings), f"{path}, {keys[-1]}")
