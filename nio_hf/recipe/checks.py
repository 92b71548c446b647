"""Checks of the settings of a recipe before it is one: its task, contradictions, and models that cannot be built."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, Trainer, get_scheduler
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from nio_hf.errors import Problem, RecipeError, one_line
from nio_hf.metrics import CAUSAL_LM, IMAGE_CLASSIFICATION, MASKED_LM
from nio_hf.recipe.keys import unknown_key
from nio_hf.recipe.settings import IMAGE_KEYS, PROCESSOR_KEYS, TEXT_KEYS, ModelSettings
from nio_hf.recipe.strict_yaml import Setting, Settings
from nio_hf.trainer import NIOTrainingArguments

_STEPS = 100
"""Length of the schedule that is tried."""
_OWN_FIELDS = {"num_labels", "id2label", "label2id"}
"""Fields of a configuration that follow from the data set."""
ARCHITECTURES: dict[str, Mapping[str, Any]] = {
    IMAGE_CLASSIFICATION: MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    CAUSAL_LM: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MASKED_LM: MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}
"""{task: {model_type of transformers: class of the model}}."""


def find_task(settings: Settings) -> str:
    """Return the task that settings name, or the only one that the architecture can learn; images where neither tells.

    Raises:
        RecipeError: Architecture that can learn several tasks, without a task.
    """
    named, model_type = settings.value("task"), settings.value("model_type")
    if named in ARCHITECTURES:
        return str(named)
    able = [task for task, types in ARCHITECTURES.items() if model_type in types]
    if len(able) > 1:
        found = f"nothing, and {model_type} can learn {' and '.join(able)}"
        raise RecipeError(Problem(settings.place("task"), found, f"Set task: {able[-1]}, or {able[0]}"))
    return able[0] if able else IMAGE_CLASSIFICATION


def setting_problems(task: str, settings: Settings) -> Iterator[Problem]:
    """Problems of settings that belong to another task or contradict each other."""
    foreign = dict.fromkeys(*((TEXT_KEYS, "text") if task == IMAGE_CLASSIFICATION else (IMAGE_KEYS, "images")))
    if task == CAUSAL_LM:
        foreign["mlm_probability"] = "masked language modelling"
    for key in sorted(foreign.keys() & settings.keys()):
        yield Problem(settings.place(key), f"is a setting of {foreign[key]}, and the task is {task}", "Leave it out")
    for key in sorted({"label_names", "batch_eval_metrics"} & settings.keys()):
        yield Problem(settings.place(key), "is decided by the task", "Leave it out")
    if settings.value("remove_unused_columns") is True:
        fix = "Leave it out: it would remove columns before samples are made of them"
        yield Problem(settings.place("remove_unused_columns"), "true", fix)
    if settings.value("train_sampling_strategy") not in (None, "random"):
        fix = "Leave it out: samples are drawn at random, each a function of the seed and the epoch"
        yield Problem(settings.place("train_sampling_strategy"), "is decided by the task", fix)
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
        # RAdam has the settings of AdamW.
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
    """Problem of a DeepSpeed scheduler that warms up although the recipe has no warmup."""
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
    """Problem of an optimiser or schedule that cannot be built for one parameter.

    It is found here because Trainer builds both after NIO has run.
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
    except Exception as error:  # whatever schedules raise
        where = settings.place("lr_scheduler_kwargs", "lr_scheduler_type")
        yield Problem(where, one_line(error), "Correct it for that lr_scheduler_type")


def argument_problem(error: Exception, settings: Settings) -> Problem:
    """Problem behind an error of TrainingArguments, at the first setting that its message names."""
    message = one_line(error)
    places = {key: match.start() for key in settings if (match := re.search(rf"\b{key}\b", message))}
    named = min(places, key=places.__getitem__, default=None)
    where = str(settings.path) if named is None else settings.place(named)
    if named in ("bf16", "fp16"):
        # The user seldom owns the file of a base.
        where = where if where.startswith(("--", f"{settings.path},")) else f"{settings.path}, {named}"
        return Problem(where, "this machine has no GPU for it", f"Give --{named} false")
    return Problem(where, message, "Correct that setting")


def model_problems(task: str, model: ModelSettings, settings: Settings) -> Iterator[Problem]:
    """Problems of the model of a recipe: its name, its configuration, and its sizes."""
    if (model.model_type is None) == (model.model_name_or_path is None):
        found = "neither" if model.model_type is None else "both"
        fix = "Give one: model_type builds a model anew, model_name_or_path loads one"
        yield Problem(f"{settings.path}, model_type and model_name_or_path", found, fix)
    elif model.model_type is None:
        for key in sorted({"model_config", *PROCESSOR_KEYS} & settings.keys()):
            fix = "Leave it out: a loaded model brings its own configuration, and its image processor"
            yield Problem(settings.place(key), "given beside model_name_or_path", fix)
    elif model.model_type not in ARCHITECTURES[task]:
        known = [ARCHITECTURES[task]] if "task" in settings else ARCHITECTURES.values()
        architectures = sorted({model_type for types in known for model_type in types})
        where = settings.place("model_type")
        fix = unknown_key(where, model.model_type, architectures).fix
        fix = fix if fix != "Remove it" else f"Choose one of {', '.join(architectures)}"
        yield Problem(where, f"{model.model_type!r} is no architecture of transformers for {task}", fix)
    else:
        yield from _config_problems(task, model, settings)


def _config_problems(task: str, model: ModelSettings, settings: Settings) -> Iterator[Problem]:
    """Problems of the configuration of a model that is built anew."""
    entries, model_type = model.model_config, cast(str, model.model_type)
    given = settings.get("model_config", Setting({}, settings.place("model_type")))
    config_class: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    known = config_class().to_dict()
    problems = []
    for key, value in entries.items():
        if key in _OWN_FIELDS:
            problems.append(Problem(given.place(key), "is decided by the data set", "Leave it out"))
        elif key not in known:
            problems.append(unknown_key(given.place(key), key, known))
        elif key == "num_channels" and value != 3:
            problems.append(Problem(given.place(key), f"{value}", "Give 3: all images become RGB"))
    yield from problems
    if problems:
        return
    try:
        config = AutoConfig.for_model(model_type, **entries)
    except (StrictDataclassError, ValueError, TypeError) as error:
        named = [key for key in entries if re.search(rf"\b{key}\b", str(error))]
        yield Problem(_place(given, *named), one_line(error), f"Correct it for {config_class.__name__}")
        return
    if task == CAUSAL_LM and not getattr(config, "is_decoder", True):
        fix = "Set task: masked-lm, or is_decoder: true in the model_config"
        yield Problem(settings.place("model_type"), f"{model_type!r} is an encoder, and the task is {task}", fix)
    if task == IMAGE_CLASSIFICATION:
        if model.image_size is not None and getattr(config, "image_size", None) is not None:
            fix = f"Set image_size in the model_config: {model_type} has one there"
            yield Problem(settings.place("image_size"), f"{model.image_size}", fix)
        yield from _size_problems(config, given)


def _size_problems(config: PreTrainedConfig, given: Setting) -> Iterator[Problem]:
    """Problem of images that patches do not tile, or of feature maps that windows do not tile."""
    sizes = {key: getattr(config, key, None) for key in ("image_size", "patch_size", "window_size")}
    for key, size in sizes.items():
        if isinstance(size, int) and size < 1:
            yield Problem(given.place(key), f"{size}", "Give a whole number of at least 1")
            return
    image, patch, window = sizes.values()
    depths: Any = getattr(config, "depths", None)
    if not isinstance(image, int) or not isinstance(patch, int):
        return
    if image % patch:
        found, smaller = f"image_size {image} is no multiple of patch_size {patch}", image - image % patch
        yield Problem(_place(given, "image_size", "patch_size"), found, f"Choose e.g. image_size {smaller or patch}")
        return
    stages = len(depths) if isinstance(window, int) and isinstance(depths, list | tuple) else 0
    for stage in range(stages):
        side, odd = divmod(image // patch, 2**stage)
        where, of_stage = _place(given, *sizes, "depths"), f"the {side} x {side} feature map of stage {stage + 1}"
        if odd:
            found = f"the feature map of stage {stage + 1} has no whole side: {image // patch} / {2**stage}"
            fix = f"Choose an image_size that is a multiple of {patch * 2**stage}"
        elif side < window and config.model_type == "swin":
            found = f"windows of {window} are larger than {of_stage}"
            fix = "Choose a smaller window_size, a larger image_size or fewer stages"
        elif side > window and side % window:
            found = f"windows of {window} do not tile {of_stage}"
            fix = "Choose a window_size or image_size that does: others are padded silently"
        else:
            continue
        yield Problem(where, found, fix)
        return


def _place(given: Setting, *entries: str) -> str:
    """Place of the entries that a problem is about; the command line where one of them stands there."""
    places = [given.place(entry) for entry in entries if entry in given.value]
    return next((place for place in places if place.startswith("--")), (places or [given.where])[0])
