"""From a YAML file and the command line to a checked recipe, with every problem reported at once."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from nio_hf.errors import ConfigError, Problem, RecipeError, one_line
from nio_hf.recipe.catalog import find_recipe
from nio_hf.recipe.settings import DataSettings, ModelSettings
from nio_hf.recipe.strict_yaml import Setting, read_overrides, read_settings
from nio_hf.recipe.values import checked, unknown_key
from nio_hf.training import NIOTrainingArguments

_DEFAULTS = {"remove_unused_columns": False, "report_to": "none"}
"""Defaults of a recipe that differ from TrainingArguments: the image column is read by a transform, and trackers are
asked for by name."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        path: the file that it was read from.
        model: what to train.
        data: what to train on.
        training: how, NIO included.
    """

    path: Path
    model: ModelSettings
    data: DataSettings
    training: NIOTrainingArguments


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; the command line goes before the file, the file before the defaults.

    Args:
        name_or_path: a YAML file, or the name of a recipe that comes with the package.
        overrides: options as `["--learning_rate", "1e-3", "--model_config.hidden_size=192"]`.

    Raises:
        RecipeError: lists every unknown key, wrong type, missing setting and setting out of range.
    """
    path = find_recipe(name_or_path)
    settings = _merge(read_settings(path), read_overrides(overrides))
    values, problems = _check_types(settings)
    model = ModelSettings(**values[ModelSettings])
    problems += _model_problems(model, settings, path)
    if "output_dir" not in settings:
        problems.append(Problem(f"{path}, output_dir", "nothing", "Say where to write, e.g. output_dir: outputs/run"))
    if settings.get("remove_unused_columns", Setting(False, "")).value is True:
        fix = "Leave it out: it would remove the images before they are read"
        problems.append(Problem(settings["remove_unused_columns"].where, "true", fix))
    if problems:
        raise RecipeError(*problems)
    try:
        training = NIOTrainingArguments(**{**_DEFAULTS, **values[NIOTrainingArguments]})
    except ConfigError as error:
        raise RecipeError(*(_relocated(problem, settings, path) for problem in error.problems)) from error
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(Problem(str(path), one_line(error), "Correct that setting")) from error
    return Recipe(path, model, DataSettings(**values[DataSettings]), training)


@functools.cache
def known_keys() -> dict[str, tuple[type, Any]]:
    """{key: (its dataclass, its annotation)} of everything that a recipe can set."""
    keys: dict[str, tuple[type, Any]] = {}
    for group in (ModelSettings, DataSettings, NIOTrainingArguments):
        hints = typing.get_type_hints(group)
        fields = dataclasses.fields(group)
        keys.update({field.name: (group, hints[field.name]) for field in fields if field.init})
    return keys


def _merge(settings: dict[str, Setting], overrides: dict[str, Setting]) -> dict[str, Setting]:
    """The settings with overrides; `key.part` replaces one entry of a mapping, a loaded model the recipe's own."""
    replaced = {"model_type", "model_config"} if "model_name_or_path" in overrides else set()
    merged = {key: setting for key, setting in settings.items() if key not in replaced}
    for key, override in overrides.items():
        outer, dot, inner = key.partition(".")
        if not dot:
            merged[key] = override
            continue
        former = merged[outer].value if outer in merged else {}
        merged[outer] = Setting({**(former if isinstance(former, dict) else {}), inner: override.value}, override.where)
    return merged


def _check_types(settings: dict[str, Setting]) -> tuple[dict[type, dict[str, Any]], list[Problem]]:
    known = known_keys()
    values: dict[type, dict[str, Any]] = {ModelSettings: {}, DataSettings: {}, NIOTrainingArguments: {}}
    problems = []
    for key, setting in settings.items():
        if key not in known:
            problems.append(unknown_key(setting.where, key, known))
            continue
        group, annotation = known[key]
        value, problem = checked(setting, annotation)
        if problem is None:
            values[group][key] = value
        else:
            problems.append(problem)
    return values, problems


def _model_problems(model: ModelSettings, settings: dict[str, Setting], path: Path) -> Iterator[Problem]:
    given = {"model_type", "model_name_or_path"} & settings.keys()
    if len(given) != 1:
        fix = "Give one: model_type builds a model anew, model_name_or_path loads one"
        yield Problem(f"{path}, model_type and model_name_or_path", "both" if given else "neither", fix)
        return
    if model.model_type is None:
        if model.model_config:
            fix = "Leave it out: a loaded model brings its own configuration"
            yield Problem(settings["model_config"].where, "given beside model_name_or_path", fix)
        return
    where = settings["model_type"].where
    architectures = sorted(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    if model.model_type not in architectures:
        problem = unknown_key(where, model.model_type, architectures)
        fix = problem.fix if problem.fix != "Remove it" else f"Choose one of {', '.join(architectures)}"
        yield Problem(where, f"{model.model_type!r} is no image classification architecture of transformers", fix)
        return
    where = settings["model_config"].where if "model_config" in settings else where
    yield from _model_config_problems(model, where)


def _model_config_problems(model: ModelSettings, where: str) -> Iterator[Problem]:
    config_class: type[PreTrainedConfig] = CONFIG_MAPPING[typing.cast(str, model.model_type)]
    known = config_class().to_dict()
    unknown = [key for key in model.model_config if key not in known]
    for key in unknown:
        yield unknown_key(f"{where}.{key}", key, known)
    if unknown:
        return
    try:
        AutoConfig.for_model(typing.cast(str, model.model_type), **model.model_config)
    except (StrictDataclassError, ValueError, TypeError) as error:
        yield Problem(where, one_line(error), f"Correct it for {config_class.__name__}")


def _relocated(problem: Problem, settings: dict[str, Setting], path: Path) -> Problem:
    """A problem of a training argument as one of the place that set it."""
    where = settings[problem.where].where if problem.where in settings else f"{path}, {problem.where}"
    return Problem(where, problem.found, problem.fix)
