"""Recipes as YAML 1.2, each top-level key with its place in the file, and options of the command line.

PyYAML follows YAML 1.1, in which `1e-3` is a string and `no` is false. Both are common in training settings.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, MappingNode
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError

from nio_hf.errors import Problem, RecipeError, one_line


@dataclasses.dataclass(frozen=True)
class Setting:
    """A value with its place, for messages.

    Attributes:
        value: Value as YAML reads it.
        where: Place of the setting: file, line and key, or option of the command line.
        entries: {entry of the mapping: its place}, for entries that were merged into the mapping one by one.
    """

    value: Any
    where: str
    entries: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def place(self, entry: str) -> str:
        """Place of an entry of the mapping."""
        return self.entries.get(entry, f"{self.where}.{entry}")


class Settings(dict[str, Setting]):
    """Settings {key: setting} of a recipe, with the path of its file."""

    def __init__(self, path: Path, settings: Mapping[str, Setting]) -> None:
        super().__init__(settings)
        self.path = path

    def value(self, key: str) -> Any:
        """Value of a key; None for a key that is not given."""
        return self[key].value if key in self else None

    def place(self, *keys: str) -> str:
        """Place of the first key that is given; the file and the last key where none is."""
        return next((self[key].where for key in keys if key in self), f"{self.path}, {keys[-1]}")


class _Constructor(SafeConstructor):
    """Constructor of plain values; dates stay text."""


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


_UNREADABLE = (YAMLError, ValueError, KeyError)
"""Errors of the reader; the last two are those of a tag whose text does not fit, as in `!!int abc`."""


def _yaml() -> YAML:
    reader = YAML(typ="safe", pure=True)
    reader.Constructor = _Constructor
    return reader


def plain_value(text: str) -> Any:
    """Return the value that a text has in a file."""
    return _yaml().load(text)


def parse_scalar(text: str, where: str) -> Any:
    """Return the value of an option. It is read as in a file, but has no comments and no numbers that overflow.

    Raises:
        RecipeError: Text that is not YAML.
    """
    try:
        value = plain_value(text)
    except _UNREADABLE as error:
        fix = "Put quotes around it if it is meant as text"
        raise RecipeError(Problem(where, f"not YAML ({one_line(error)})", fix)) from error
    overflows = isinstance(value, float) and math.isinf(value) and "inf" not in text.lower()
    return text if overflows or ("#" in text and isinstance(value, str | None) and text[:1] not in "'\"") else value


def read_settings(path: Path) -> dict[str, Setting]:
    """Read the top-level keys of a YAML file.

    Raises:
        RecipeError: File that is missing, unreadable, not YAML, or not a mapping of names.
    """
    reader = _yaml()
    try:
        root = reader.compose(path.read_text(encoding="utf-8"))
        values = None if root is None else reader.constructor.construct_document(root)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RecipeError(Problem(str(path), f"cannot be read: {reason}", "Give the path of a YAML file")) from error
    except _UNREADABLE as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = str(path) if mark is None else f"{path}, line {mark.line + 1}"
        raise RecipeError(Problem(place, f"not YAML: {problem or one_line(error)}", "Correct that line")) from error
    if not isinstance(root, MappingNode) or not isinstance(values, dict) or not all(isinstance(k, str) for k in values):
        found = f"{type(values).__name__} instead of settings"
        raise RecipeError(Problem(str(path), found, "Write one setting a line, as in `learning_rate: 1e-3`"))
    lines = {key.value: key.start_mark.line + 1 for key, _ in root.value}
    return {key: Setting(value, f"{path}, line {lines[key]}, {key}") for key, value in values.items()}


def read_overrides(options: Sequence[str], decided: Mapping[str, Any] | None = None) -> dict[str, Setting]:
    """Read settings from command line options: `--key value`, `--key=value`, or `--key` alone for true.

    Dashes in a key count as underscores. `--key.part value` sets one entry of a mapping. Settings {key: value} that are
    decided override the options.

    Raises:
        RecipeError: Option that is not of this form, or is given twice.
    """
    settings: dict[str, Setting] = {}
    position = 0
    while position < len(options):
        option = options[position]
        position += 1
        if not re.match(r"--[A-Za-z]", option):
            raise RecipeError(Problem(option, "not a setting", "Write overrides as `--key value`"))
        name, equals, text = option.removeprefix("--").partition("=")
        if not equals:
            has_value = position < len(options) and not re.match(r"--[A-Za-z]", options[position])
            text = options[position] if has_value else "true"
            position += has_value
        where = f"--{name}"
        key = name.replace("-", "_")
        if key in settings:
            raise RecipeError(Problem(where, "given twice", "Give it once"))
        settings[key] = Setting(parse_scalar(text, where), where)
    return settings | {key: Setting(value, f"--{key}") for key, value in (decided or {}).items()}
