"""Whether the model that a recipe describes can be built, and fits its images."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from nio_hf.errors import Problem, one_line
from nio_hf.metrics import CAUSAL_LM, IMAGE_CLASSIFICATION
from nio_hf.recipe.settings import PROCESSOR_KEYS, ModelSettings
from nio_hf.recipe.strict_yaml import Setting
from nio_hf.recipe.tasks import ARCHITECTURES
from nio_hf.recipe.values import unknown_key

_OURS = {"num_labels", "id2label", "label2id"}


def model_problems(task: str, model: ModelSettings, settings: dict[str, Setting], path: Path) -> Iterator[Problem]:
    """What is wrong with the model of a recipe: its name, its configuration, or its sizes."""
    given = [key for key in ("model_type", "model_name_or_path") if getattr(model, key) is not None]
    if len(given) != 1:
        fix = "Give one: model_type builds a model anew, model_name_or_path loads one"
        yield Problem(f"{path}, model_type and model_name_or_path", "both" if given else "neither", fix)
        return
    if model.model_type is None:
        for key in {"model_config", *PROCESSOR_KEYS} & settings.keys():
            fix = "Leave it out: a loaded model brings its own configuration, and its image processor"
            yield Problem(settings[key].where, "given beside model_name_or_path", fix)
        return
    where = settings["model_type"].where
    known = [ARCHITECTURES[task]] if "task" in settings else ARCHITECTURES.values()
    architectures = sorted({model_type for types in known for model_type in types})
    if model.model_type not in ARCHITECTURES[task]:
        problem = unknown_key(where, model.model_type, architectures)
        fix = problem.fix if problem.fix != "Remove it" else f"Choose one of {', '.join(architectures)}"
        yield Problem(where, f"{model.model_type!r} is no architecture of transformers for {task}", fix)
        return
    config_setting = settings.get("model_config", Setting({}, where))
    yield from _config_problems(task, model, settings, dataclasses.replace(config_setting, value=model.model_config))


def _config_problems(
    task: str, model: ModelSettings, settings: dict[str, Setting], config_setting: Setting
) -> Iterator[Problem]:
    config_class: type[PreTrainedConfig] = CONFIG_MAPPING[typing.cast(str, model.model_type)]
    known = config_class().to_dict()
    for key in _OURS & model.model_config.keys():
        yield Problem(config_setting.place(key), "is decided by the data set", "Leave it out")
        return
    channels = model.model_config.get("num_channels", 3)
    if channels != 3:
        yield Problem(config_setting.place("num_channels"), f"{channels}", "Give 3: all images become RGB")
        return
    unknown = [key for key in model.model_config if key not in known]
    for key in unknown:
        yield unknown_key(config_setting.place(key), key, known)
    if unknown:
        return
    try:
        config = AutoConfig.for_model(typing.cast(str, model.model_type), **model.model_config)
    except (StrictDataclassError, ValueError, TypeError) as error:
        named = [key for key in model.model_config if re.search(rf"\b{key}\b", str(error))]
        yield Problem(_place(config_setting, *named), one_line(error), f"Correct it for {config_class.__name__}")
        return
    if task == CAUSAL_LM and not getattr(config, "is_decoder", True):
        fix = "Set task: masked-lm, or is_decoder: true in the model_config"
        yield Problem(settings["model_type"].where, f"{model.model_type!r} is an encoder, and the task is {task}", fix)
    if task != IMAGE_CLASSIFICATION:
        return
    own_size = getattr(config, "image_size", None)
    if model.image_size is not None and own_size is not None:
        fix = f"Set image_size in the model_config: {model.model_type} has one there"
        yield Problem(settings["image_size"].where, f"{model.image_size}", fix)
    yield from _size_problems(config, config_setting)


def _size_problems(config: PreTrainedConfig, config_setting: Setting) -> Iterator[Problem]:
    """Images that patches do not tile, and feature maps that windows do not tile."""
    image_size: Any = getattr(config, "image_size", None)
    patch_size: Any = getattr(config, "patch_size", None)
    if not isinstance(image_size, int) or not isinstance(patch_size, int):
        return
    for key, size in (("image_size", image_size), ("patch_size", patch_size)):
        if size < 1:
            yield Problem(config_setting.place(key), f"{size}", "Give a whole number of at least 1")
            return
    if image_size % patch_size:
        found = f"image_size {image_size} is no multiple of patch_size {patch_size}"
        smaller = image_size - image_size % patch_size
        where = _place(config_setting, "image_size", "patch_size")
        yield Problem(where, found, f"Choose e.g. image_size {smaller or patch_size}")
        return
    window: Any = getattr(config, "window_size", None)
    depths: Any = getattr(config, "depths", None)
    if not isinstance(window, int) or not isinstance(depths, list | tuple):
        return
    if window < 1:
        yield Problem(config_setting.place("window_size"), f"{window}", "Give a whole number of at least 1")
        return
    where = _place(config_setting, "image_size", "patch_size", "window_size", "depths")
    for stage in range(len(depths)):
        side, odd = divmod(image_size // patch_size, 2**stage)
        if odd:
            found = f"the feature map of stage {stage + 1} has no whole side: {image_size // patch_size} / {2**stage}"
            yield Problem(where, found, f"Choose an image_size that is a multiple of {patch_size * 2**stage}")
            return
        if side < window and config.model_type == "swin":
            found = f"windows of {window} are larger than the {side} x {side} feature map of stage {stage + 1}"
            yield Problem(where, found, "Choose a smaller window_size, a larger image_size or fewer stages")
            return
        if side > window and side % window:
            found = f"windows of {window} do not tile the {side} x {side} feature map of stage {stage + 1}"
            yield Problem(where, found, "Choose a window_size or image_size that does: others are padded silently")
            return


def _place(config_setting: Setting, *entries: str) -> str:
    """The place of the entries that a problem is about: the command line, where one of them stands there."""
    places = [config_setting.place(entry) for entry in entries if entry in config_setting.value]
    return next((place for place in places if place.startswith("--")), (places or [config_setting.where])[0])
