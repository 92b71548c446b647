"""YAML as its 1.2 core schema reads it, each top-level key with its place in the file.

PyYAML follows YAML 1.1, in which `1e-3` is a string and `no` is false: both are common in training settings.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nio_hf.errors import Problem, RecipeError, one_line


@dataclasses.dataclass(frozen=True)
class Setting:
    """A value and where it was written, for messages.

    Attributes:
        value: as YAML reads it.
        where: the file, line and key, or the option of the command line.
        entries: {entry of a mapping: where it was written}, of those that were merged into it one by one.
    """

    value: Any
    where: str
    entries: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def place(self, entry: str) -> str:
        """Where an entry of the mapping was written."""
        return self.entries.get(entry, f"{self.where}.{entry}")


class _CoreSchemaLoader(yaml.SafeLoader):
    """A safe loader with the scalars of the YAML 1.2 core schema, in which a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key that is no name", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_CoreSchemaLoader.yaml_implicit_resolvers = {}
_CORE_SCALARS = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
]
for _name, _pattern, _first in _CORE_SCALARS:
    _CoreSchemaLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


_CoreSchemaLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_scalar(text: str, where: str) -> Any:
    """The value of one setting as it would be read in a file.

    Raises:
        RecipeError: for text that is not YAML.
    """
    try:
        return yaml.load(text, _CoreSchemaLoader)
    except yaml.YAMLError as error:
        fix = "Put quotes around it if it is meant as text"
        raise RecipeError(Problem(where, f"not YAML ({one_line(error)})", fix)) from error


def read_settings(path: Path) -> dict[str, Setting]:
    """The top-level keys of a YAML file.

    Raises:
        RecipeError: for a file that is missing, unreadable, not YAML, or not a mapping of names.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RecipeError(Problem(str(path), f"cannot be read: {reason}", "Give the path of a YAML file")) from error
    try:
        root = yaml.compose(text, _CoreSchemaLoader)
        values = yaml.load(text, _CoreSchemaLoader)
    except yaml.YAMLError as error:
        place, message = _located(path, error)
        raise RecipeError(Problem(place, f"not YAML: {message}", "Correct that line")) from error
    if not isinstance(root, yaml.MappingNode) or not all(isinstance(key, str) for key in values):
        found = f"{type(values).__name__} instead of settings"
        raise RecipeError(Problem(str(path), found, "Write one setting a line, as in `learning_rate: 1e-3`"))
    lines = {key.value: key.start_mark.line + 1 for key, _ in root.value}
    return {key: Setting(value, f"{path}, line {lines[key]}, {key}") for key, value in values.items()}


def read_overrides(options: Sequence[str]) -> dict[str, Setting]:
    """Settings from command line options: `--key value`, `--key=value`, or `--key` alone for true.

    Dashes in a key count as underscores. `--key.part value` sets one entry of a mapping.

    Raises:
        RecipeError: for an option that is not of this form, or that is given twice.
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
    return settings


def with_values(options: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """Command line options with other values for some keys."""
    merged = {key: setting.value for key, setting in read_overrides(options).items()} | dict(values)
    return [part for key, value in merged.items() for part in (f"--{key}", json.dumps(value))]


def _located(path: Path, error: yaml.YAMLError) -> tuple[str, str]:
    mark = getattr(error, "problem_mark", None)
    place = str(path) if mark is None else f"{path}, line {mark.line + 1}"
    return place, getattr(error, "problem", None) or one_line(error)
