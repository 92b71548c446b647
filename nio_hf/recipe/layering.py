"""Settings in layers: a recipe over the one that it names as its base, the command line over both."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from nio_hf.catalog import find_recipe
from nio_hf.errors import Problem, RecipeError
from nio_hf.recipe.settings import PROCESSOR_KEYS
from nio_hf.recipe.strict_yaml import Setting, plain_value, read_settings

BASE_KEY = "base"
_OWNED = {"model_type": "model_config", "optim": "optim_args", "lr_scheduler_type": "lr_scheduler_kwargs"}
"""{setting that chooses a class: setting that holds the arguments of the class}."""


def read_layers(path: Path) -> dict[str, Setting]:
    """Read the settings of a recipe over those of its base, and of the bases of its base.

    A base is a recipe that comes with the package, or a file in the folder of the recipe that names it.

    Raises:
        RecipeError: File that cannot be read, or base that does not exist, lies elsewhere, or leads back to its recipe.
    """
    layers, seen = [read_settings(path)], [path.resolve()]
    while (base := layers[-1].pop(BASE_KEY, None)) is not None:
        path = _find_base(base, path)
        if path.resolve() in seen:
            raise RecipeError(Problem(base.where, f"{base.value!r} leads back to this recipe", "Name another base"))
        layers.append(read_settings(path))
        seen.append(path.resolve())
    merged: dict[str, Setting] = {}
    for layer in reversed(layers):
        merged = merge(merged, layer)
    return merged


def settings_yaml(settings: Mapping[str, Setting]) -> str:
    """Settings as the text of a recipe; YAML 1.1 and 1.2 read it alike."""
    values = {key: setting.value for key, setting in settings.items()}
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.2 would read as something else; YAML 1.1, PyYAML's own, is seen to by PyYAML."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    looks_plain = re.fullmatch(r"[\w.+-]+", text) is not None
    style = "'" if looks_plain and plain_value(text) != text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def merge(lower: Mapping[str, Setting], upper: Mapping[str, Setting]) -> dict[str, Setting]:
    """Merge settings; those of `upper` override those of `lower`.

    `model_config` is merged entry by entry, `key.part` sets one entry of any mapping. Another `model_type` starts from
    an empty `model_config`, another optimiser or schedule without the arguments of the former one. A loaded model
    brings its configuration and its image processor.
    """
    given = {key for key, setting in upper.items() if setting.value is not None}
    changed = {key for key in lower.keys() & upper.keys() if lower[key].value != upper[key].value}
    replaced = {owned for owner, owned in _OWNED.items() if owner in changed}
    if "model_name_or_path" in given:
        replaced |= {"model_type", "model_config", *PROCESSOR_KEYS}
    elif "model_type" in given:
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


def _find_base(base: Setting, file: Path) -> Path:
    """File of a base: a recipe that comes with the package, or one in the folder of the recipe that names it."""
    if not isinstance(base.value, str):
        raise RecipeError(Problem(base.where, f"{base.value!r}", "Name one recipe"))
    beside = file.parent / base.value
    if beside.is_file() and not beside.resolve().is_relative_to(file.parent.resolve()):
        fix = "Put the base into the folder of the recipe, or name one that comes with the package"
        raise RecipeError(Problem(base.where, f"{base.value!r} leads out of the folder of the recipe", fix))
    try:
        return beside if beside.is_file() else find_recipe(base.value, packaged=True)
    except RecipeError as error:
        raise RecipeError(*(Problem(base.where, f"{p.where!r} is no recipe", p.fix) for p in error.problems)) from None
