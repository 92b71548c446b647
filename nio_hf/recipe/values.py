"""Whether a value of a recipe is what a dataclass field is annotated with."""

from __future__ import annotations

import difflib
import enum
import types
from collections.abc import Collection
from typing import Any, Literal, Union, get_args, get_origin

from nio_hf.errors import Problem
from nio_hf.recipe.strict_yaml import Setting

_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}
_NONE = "none"


def checked(setting: Setting, annotation: Any) -> tuple[Any, Problem | None]:
    """The value for a field, or what is wrong with it.

    A whole number becomes a float where the field is one. "none" becomes null where the field may be null, unless it is
    a word that it takes: a choice of its own, or one of a list of words (`report_to`).
    """
    members = _members(annotation)
    choices = _choices(members)
    if setting.value == _NONE and type(None) in members and list[str] not in members and _NONE not in choices:
        return None, None
    if choices and isinstance(setting.value, str):
        if setting.value in choices:
            return setting.value, None
        return None, Problem(setting.where, f"{setting.value!r}", f"Choose one of {', '.join(map(str, choices))}")
    if isinstance(setting.value, list):
        return _checked_items(setting, members)
    plain = [get_origin(member) or member for member in members]
    if _is_number(setting.value) and float in plain and int not in plain:
        return float(setting.value), None
    if type(setting.value) in plain:
        return setting.value, None
    return None, Problem(setting.where, _described(setting.value), _advice(setting.value, plain, choices))


def _checked_items(setting: Setting, members: list[Any]) -> tuple[Any, Problem | None]:
    """A list with each of its items checked, where the annotation says what they are."""
    lists = [member for member in members if (get_origin(member) or member) is list]
    if not lists:
        plain = [get_origin(member) or member for member in members]
        return None, Problem(setting.where, _described(setting.value), _advice(setting.value, plain, []))
    item_types = get_args(lists[0])
    if not item_types:
        return setting.value, None
    items = [checked(Setting(item, f"{setting.where}[{n}]"), item_types[0]) for n, item in enumerate(setting.value)]
    problem = next((problem for _, problem in items if problem is not None), None)
    return (None if problem else [item for item, _ in items]), problem


def unknown_key(where: str, key: str, known: Collection[str]) -> Problem:
    """The problem of a key that does not exist, with those that may be meant."""
    longer = [other for other in known if other.endswith(f"_{key}")]
    spelt_out = [other for other in known if key == "".join(word[:1] for word in other.split("_"))]
    near = [*spelt_out[:1], *longer] or difflib.get_close_matches(key, list(known), n=1)
    *first, last = map(repr, near or [""])
    meant = f"Did you mean {', '.join(first)}{' or ' * bool(first)}{last}?"
    return Problem(where, f"{key!r} is no known key", meant if near else "Remove it")


def _members(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for member in get_args(annotation) for part in _members(member)]
    return [annotation]


def _choices(members: list[Any]) -> list[Any]:
    """The words that an enumeration or a literal allows."""
    return [
        value
        for member in members
        for value in (
            get_args(member)
            if get_origin(member) is Literal
            else [item.value for item in member]
            if isinstance(member, type) and issubclass(member, enum.Enum)
            else []
        )
    ]


def _advice(value: Any, plain: list[Any], choices: list[Any]) -> str:
    wanted = [str(choice) for choice in choices] or [_NAMES[kind] for kind in plain if kind in _NAMES]
    advice = "Give " + " or ".join(dict.fromkeys(wanted))
    looks_numeric = isinstance(value, str) and _as_number(value) is not None
    return f"{advice}, without quotes" if looks_numeric and (int in plain or float in plain) else advice


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _described(value: Any) -> str:
    return "nothing" if value is None else f"{value!r}, {_NAMES.get(type(value), type(value).__name__)}"
