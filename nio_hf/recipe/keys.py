"""Everything that a recipe can set: keys with their types and ranges, and checks of values against them."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import functools
import operator
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Interval
from pydantic import ConfigDict, TypeAdapter, ValidationError

from nio_hf.errors import Problem
from nio_hf.recipe.settings import (
    AugmentationSettings,
    Count,
    DataSettings,
    ModelSettings,
    NotNegative,
    OptimizationSettings,
    Positive,
    Seed,
    ShareBelowOne,
    TextSettings,
)
from nio_hf.recipe.strict_yaml import Setting
from nio_hf.trainer import NIOTrainingArguments

_OWN = (ModelSettings, DataSettings, TextSettings, AugmentationSettings, OptimizationSettings)
GROUPS: tuple[type, ...] = (*_OWN, NIOTrainingArguments)
"""Classes that the settings of a recipe are fields of."""
_BATCHES = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_RANGES: dict[str, Any] = {
    **dict.fromkeys(_BATCHES, Count),
    **dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "adam_epsilon"), NotNegative),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), ShareBelowOne),
    "num_train_epochs": Positive,
    "dataloader_num_workers": Annotated[int, Interval(ge=0)],
    "seed": Seed,
    **dict.fromkeys(("data_seed", "nio_seed"), Seed | None),
}
"""Types of training arguments with a range."""
_NAMES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
}
"""{type of Python, or of an error of pydantic: name in messages}."""
_CONFIG = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


@functools.cache
def known_keys() -> dict[str, tuple[type, Any]]:
    """{key: (class, annotation)} of everything that a recipe can set."""
    keys: dict[str, tuple[type, Any]] = {}
    for group in GROUPS:
        hints = typing.get_type_hints(group, include_extras=True) | (_RANGES if group is NIOTrainingArguments else {})
        keys |= {field.name: (group, hints[field.name]) for field in dataclasses.fields(group) if field.init}
    return keys


def check_value(setting: Setting, annotation: Any) -> tuple[Any, Problem | None]:
    """Return (value for a field with an annotation, its problem); one of them is None.

    A whole number becomes a float where the field is one. "none" becomes null where the field may be null, unless the
    field takes that word: as a choice of its own, or in a list of words (`report_to`).
    """
    annotation = _with_choices(annotation)
    parts, value = list(_parts(annotation)), setting.value
    if value == "none" and NoneType in parts and "none" not in parts and list[str] not in parts:
        value = None
    try:
        return TypeAdapter(annotation, config=_CONFIG).validate_python(value), None
    except ValidationError as error:
        return None, _problem(setting, error.errors(include_url=False), annotation)


def unknown_key(where: str, key: str, known: Collection[str]) -> Problem:
    """Problem of a key that does not exist, with the known keys that may be meant."""
    longer = [other for other in known if other.endswith(f"_{key}")]
    spelt_out = [other for other in known if key == "".join(word[:1] for word in other.split("_"))]
    near = [*spelt_out[:1], *longer] or difflib.get_close_matches(key, list(known), n=1)
    *first, last = map(repr, near or [""])
    meant = f"Did you mean {', '.join(first)}{' or ' * bool(first)}{last}?"
    return Problem(where, f"{key!r} is no known key", meant if near else "Remove it")


def _with_choices(annotation: Any) -> Any:
    """Replace an enumeration in an annotation, and the `str` beside it, by the words of the enumeration."""
    members = get_args(annotation)
    if isinstance(annotation, enum.EnumType):
        return Literal[tuple(item.value for item in list[enum.Enum](annotation))]
    if get_origin(annotation) in (Union, UnionType):
        has_words = any(isinstance(member, enum.EnumType) for member in members)
        chosen = (_with_choices(member) for member in members if member is not str or not has_words)
        return functools.reduce(operator.or_, chosen)
    return list[_with_choices(members[0])] if members and get_origin(annotation) is list else annotation  # type: ignore[misc]


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation and its parts."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def _problem(setting: Setting, errors: Sequence[Mapping[str, Any]], annotation: Any) -> Problem:
    """Problem of a value, or of its first wrong entry."""
    parts, where = list(_parts(annotation)), setting.where
    # The places of errors begin with a member of the union where it has several.
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    tagged = sum(member is not NoneType for member in members) > 1
    inner = [error for error in errors if error["loc"][tagged:]]
    first = (inner or errors)[0]
    where += "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][tagged:])
    value, kind = first["input"], first["type"]
    if kind == "value_error":
        return Problem(where, f"{value!r}", str(first["ctx"]["error"]))
    if kind == "finite_number":
        return Problem(where, f"{value!r}", "Give a finite number")
    if kind.startswith(("greater", "less")):
        return Problem(where, f"{value!r}", f"Give {_range(parts)}{', or null' * (NoneType in parts)}")
    choices = [str(part) for part in parts if isinstance(part, str)]
    if choices and isinstance(value, str):
        return Problem(where, f"{value!r}", f"Choose one of {', '.join(choices)}")
    wanted = [_NAMES.get(error["type"].removesuffix("_type"), "") for error in inner[:1] or errors]
    wanted = [*choices, *filter(None, wanted), *["null"] * (NoneType in parts and not inner)]
    fix = f"Give {' or '.join(dict.fromkeys(wanted))}"
    if isinstance(value, str) and {"a number", "a whole number"} & set(wanted):
        with contextlib.suppress(ValueError):
            float(value)
            fix += ", without quotes"
    found = "nothing" if value is None else f"{value!r}, {_NAMES.get(type(value).__name__, type(value).__name__)}"
    return Problem(where, found, fix)


def _range(parts: Sequence[Any]) -> str:
    """Range of a number in words."""
    limits = next(part for part in parts if isinstance(part, Interval))
    number = "a whole number" if int in parts else "a number"
    if limits.lt is None and limits.le is None:
        return f"{number} above {limits.gt}" if limits.ge is None else f"{number} of at least {limits.ge}"
    least = f"({limits.gt}" if limits.ge is None else f"[{limits.ge}"
    return f"{number} in {least}, {limits.lt})" if limits.le is None else f"{number} in {least}, {limits.le}]"
