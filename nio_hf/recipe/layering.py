"""Settings in layers: a recipe over the one that it names as its base, the command line over both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from nio_hf.catalog import find_packaged
from nio_hf.errors import Problem, RecipeError
from nio_hf.recipe.settings import PROCESSOR_KEYS
from nio_hf.recipe.strict_yaml import Setting, read_settings

BASE_KEY = "base"
_OWNED = {"model_type": "model_config", "optim": "optim_args", "lr_scheduler_type": "lr_scheduler_kwargs"}
"""Settings that say what to build, and those that are arguments of it."""


def read_layers(path: Path) -> dict[str, Setting]:
    """The settings of a recipe over those of its base, and of the base of that.

    A base is named as one that comes with the package, or by a path inside of the folder of the file that names it.

    Raises:
        RecipeError: for a file that cannot be read, a base that does not exist or lies elsewhere, or one that leads
            back to its recipe.
    """
    layers: list[dict[str, Setting]] = []
    seen: list[Path] = []
    file: Path | None = path
    while file is not None:
        settings = read_settings(file)
        seen.append(file.resolve())
        base = settings.pop(BASE_KEY, None)
        layers.append(settings)
        file = None if base is None else _find_base(base, file)
        if base is not None and file is not None and file.resolve() in seen:
            raise RecipeError(Problem(base.where, f"{base.value!r} leads back to this recipe", "Name another base"))
    merged: dict[str, Setting] = {}
    for layer in reversed(layers):
        merged = merge(merged, layer)
    return merged


def resolved_yaml(path: Path) -> str:
    """A recipe as one file, with the settings of its base and without comments.

    Raises:
        RecipeError: as [`read_layers`].
    """
    return settings_yaml(read_layers(path))


def settings_yaml(settings: Mapping[str, Setting]) -> str:
    """Settings as the text of a recipe."""
    values = {key: setting.value for key, setting in settings.items()}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def merge(lower: dict[str, Setting], upper: dict[str, Setting]) -> dict[str, Setting]:
    """The settings of both, those of `upper` first.

    `model_config` is merged entry by entry, `key.part` sets one entry of any mapping. Another `model_type` starts from
    an empty `model_config`, another optimiser or schedule without the arguments of the former, and a loaded model
    brings its configuration with its image processor.
    """
    replaced = {owned for owner, owned in _OWNED.items() if _is_changed(owner, lower, upper)}
    if _given("model_name_or_path", upper):
        replaced |= {"model_type", "model_config", *PROCESSOR_KEYS}
    elif _given("model_type", upper):
        replaced.add("model_name_or_path")
    merged = {key: setting for key, setting in lower.items() if key not in replaced}
    for key, setting in upper.items():
        outer, dot, inner = key.partition(".")
        entries = {inner: setting.value} if dot else setting.value
        places: dict[str, str] = {}
        if (dot or outer == "model_config") and isinstance(entries, dict):
            former = merged.get(outer, Setting({}, setting.where))
            if isinstance(former.value, dict):
                own = {entry: setting.where if dot else setting.place(entry) for entry in entries}
                places = {entry: former.place(entry) for entry in former.value} | own
                entries = {**former.value, **entries}
        merged[outer] = Setting(entries, setting.where, places)
    return merged


def _given(key: str, settings: dict[str, Setting]) -> bool:
    return key in settings and settings[key].value is not None


def _is_changed(key: str, lower: dict[str, Setting], upper: dict[str, Setting]) -> bool:
    return key in lower and key in upper and lower[key].value != upper[key].value


def _find_base(base: Setting, file: Path) -> Path:
    """The file of a base: a recipe that comes with the package, or one in the folder of the recipe that names it."""
    if not isinstance(base.value, str):
        raise RecipeError(Problem(base.where, f"{base.value!r}", "Name one recipe"))
    beside = file.parent / base.value
    if beside.is_file() and not beside.resolve().is_relative_to(file.parent.resolve()):
        fix = "Put the base into the folder of the recipe, or name one that comes with the package"
        raise RecipeError(Problem(base.where, f"{base.value!r} leads out of the folder of the recipe", fix))
    try:
        return beside if beside.is_file() else find_packaged(base.value)
    except RecipeError as error:
        raise RecipeError(*(Problem(base.where, f"{p.where!r} is no recipe", p.fix) for p in error.problems)) from None
