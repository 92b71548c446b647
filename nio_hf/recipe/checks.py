"""Settings that contradict each other or cannot be built: checks of a recipe before it is one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer, get_scheduler

from nio_hf.errors import Problem, one_line
from nio_hf.metrics import CAUSAL_LM, IMAGE_CLASSIFICATION
from nio_hf.recipe.settings import IMAGE_KEYS, TEXT_KEYS
from nio_hf.recipe.strict_yaml import Settings
from nio_hf.trainer import NIOTrainingArguments

_STEPS = 100


def setting_problems(task: str, settings: Settings) -> Iterator[Problem]:
    """The problems of settings that are of another task, or cannot stand together."""
    foreign = dict.fromkeys(*((TEXT_KEYS, "text") if task == IMAGE_CLASSIFICATION else (IMAGE_KEYS, "images")))
    if task == CAUSAL_LM:
        foreign["mlm_probability"] = "masked language modelling"
    for key in sorted(foreign.keys() & settings.keys()):
        yield Problem(settings.place(key), f"is a setting of {foreign[key]}, and the task is {task}", "Leave it out")
    for key in sorted({"label_names", "batch_eval_metrics"} & settings.keys()):
        yield Problem(settings.place(key), "is decided by the task", "Leave it out")
    if settings.value("remove_unused_columns") is True:
        fix = "Leave it out: it would remove what samples are made of before they are read"
        yield Problem(settings.place("remove_unused_columns"), "true", fix)
    if settings.value("global_batch_size") is not None:
        if settings.value("auto_find_batch_size") is True:
            fix = "Leave it out: a smaller batch would make smaller steps than global_batch_size says"
            yield Problem(settings.place("auto_find_batch_size"), "given beside global_batch_size", fix)
        if "gradient_accumulation_steps" in settings:
            fix = "Give one of them: accumulation follows from global_batch_size"
            yield Problem(settings.place("gradient_accumulation_steps"), "given beside global_batch_size", fix)
    optimizer = settings.value("optimizer")
    for key in ("optim", "optim_args", "nio_seed_optimizer"):
        value = settings.value(key)
        # The settings of AdamW are those of RAdam, which changes the sizes of its steps.
        is_adamw = key == "optim" and str(value).startswith("adamw_torch")
        if optimizer is not None and value is not None and not is_adamw:
            yield Problem(settings.place(key), f"given beside optimizer: {optimizer}", "Leave one of them out")
    if settings.value("streaming") is True:
        steps = settings.value("max_steps")
        if not isinstance(steps, int) or steps < 1:
            fix = "Set max_steps: the length of a stream is not known before it is read"
            yield Problem(settings.place("streaming"), "without max_steps", fix)
        if settings.value("repeated_augmentation") not in (None, 1):
            fix = "Leave one of them out: a stream is drawn in its own order"
            yield Problem(settings.place("repeated_augmentation"), "given with streaming", fix)
    yield from _deepspeed_problems(settings.value("deepspeed"), settings)


def _deepspeed_problems(deepspeed: Any, settings: Settings) -> Iterator[Problem]:
    """The problem of a scheduler of DeepSpeed that warms up where the recipe says that nothing does."""
    where = settings.place("deepspeed")
    if isinstance(deepspeed, str):
        try:
            deepspeed = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            fix = "Give the path of a JSON file, or the settings themselves"
            yield Problem(where, f"cannot be read: {one_line(error)}", fix)
    scheduler = (deepspeed.get("scheduler") if isinstance(deepspeed, dict) else None) or {}
    name, steps = str(scheduler.get("type", "")), (scheduler.get("params") or {}).get("warmup_num_steps", "auto")
    if name.startswith("Warmup") and steps not in (0, "auto") and not settings.value("warmup_steps"):
        fix = 'Set its warmup_num_steps to "auto", or leave the scheduler to the recipe'
        yield Problem(where, f"its {name} warms up for {steps} steps, but warmup_steps is 0", fix)


def optimizer_problems(training: NIOTrainingArguments, settings: Settings) -> Iterator[Problem]:
    """The problem of an optimiser or a schedule that cannot be built, tried on a parameter of one number.

    Trainer builds them only after NIO has run.
    """
    parameter = torch.nn.Parameter(torch.zeros(1))
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(training)
        optimizer_class([parameter], **options)
    except ImportError as error:
        yield Problem(settings.place("optim"), one_line(error), "Install it, or choose another optim")
        return
    except Exception as error:  # whatever the libraries of optimisers raise
        yield Problem(settings.place("optim_args", "optim"), one_line(error), "Correct it, or optim")
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
        where = settings.place("lr_scheduler_kwargs", "lr_scheduler_type")
        yield Problem(where, one_line(error), "Correct it for that lr_scheduler_type")


def argument_problem(error: Exception, settings: Settings) -> Problem:
    """The problem behind an error of TrainingArguments, at the first setting that its message names."""
    message = one_line(error)
    places = {key: match.start() for key in settings if (match := re.search(rf"\b{key}\b", message))}
    named = min(places, key=places.__getitem__, default=None)
    where = str(settings.path) if named is None else settings.place(named)
    if named in ("bf16", "fp16"):
        # The file of a base is seldom the user's.
        where = where if where.startswith(("--", f"{settings.path},")) else f"{settings.path}, {named}"
        return Problem(where, "this machine has no GPU for it", f"Give --{named} false")
    return Problem(where, message, "Correct that setting")
