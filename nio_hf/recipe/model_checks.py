"""Which task a recipe is of, and whether the model that it describes can be built and fits its images."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from nio_hf.errors import Problem, RecipeError, one_line
from nio_hf.metrics import CAUSAL_LM, IMAGE_CLASSIFICATION, MASKED_LM
from nio_hf.recipe.settings import PROCESSOR_KEYS, ModelSettings
from nio_hf.recipe.strict_yaml import Setting, Settings
from nio_hf.recipe.values import unknown_key

ARCHITECTURES: dict[str, Mapping[str, Any]] = {
    IMAGE_CLASSIFICATION: MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    CAUSAL_LM: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MASKED_LM: MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}
"""{task: {model_type of transformers: class of the model}}."""


def find_task(settings: Settings) -> str:
    """The task that is named, or the only one that the architecture can learn; images where neither tells.

    Raises:
        RecipeError: where the architecture can learn several of them.
    """
    named, model_type = settings.value("task"), settings.value("model_type")
    if named in ARCHITECTURES:
        return str(named)
    able = [task for task, types in ARCHITECTURES.items() if model_type in types]
    if len(able) > 1:
        found = f"nothing, and {model_type} can learn {' and '.join(able)}"
        raise RecipeError(Problem(settings.place("task"), found, f"Set task: {able[-1]}, or {able[0]}"))
    return able[0] if able else IMAGE_CLASSIFICATION


def model_problems(task: str, model: ModelSettings, settings: Settings) -> Iterator[Problem]:
    """What is wrong with the model of a recipe: its name, its configuration, or its sizes."""
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
    entries, model_type = model.model_config, cast(str, model.model_type)
    given = settings.get("model_config", Setting({}, settings.place("model_type")))
    config_class: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    known = config_class().to_dict()
    problems = [
        *(Problem(given.place(key), "is decided by the data set", "Leave it out") for key in entries if key in _OURS),
        *(unknown_key(given.place(key), key, known) for key in entries if key not in {*known, *_OURS}),
    ]
    if entries.get("num_channels", 3) != 3:
        where = given.place("num_channels")
        problems.append(Problem(where, f"{entries['num_channels']}", "Give 3: all images become RGB"))
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


_OURS = {"num_labels", "id2label", "label2id"}


def _size_problems(config: PreTrainedConfig, given: Setting) -> Iterator[Problem]:
    """The problem of images that patches do not tile, or feature maps that windows do not tile."""
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
    """The place of the entries that a problem is about: the command line, where one of them stands there."""
    places = [given.place(entry) for entry in entries if entry in given.value]
    return next((place for place in places if place.startswith("--")), (places or [given.where])[0])
