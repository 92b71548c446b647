"""Records that JSON has held become records again."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints


def restored(kind: Any, value: Any) -> Any:
    """A value of a type, from what `dataclasses.asdict` and a trip through JSON have made of it.

    Args:
        kind: Data class, a tuple, a mapping or an optional of such, or a plain type.
        value: Mappings, lists and plain values.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if value is None:
        return None
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: restored(hints[name], item) for name, item in value.items()})  # type: ignore[operator]
    if origin in (Union, types.UnionType):
        return restored(parts[0], value)
    if origin is tuple and isinstance(value, list):
        return tuple(restored(parts[0], item) for item in value)
    if origin is dict and isinstance(value, Mapping):
        return {key: restored(parts[1], item) for key, item in value.items()}
    return value
