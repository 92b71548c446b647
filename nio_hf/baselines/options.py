"""Checks of the options that a method has beside the settings of all."""

from __future__ import annotations

import math
from typing import Any

from nio_hf.errors import ConfigError, Problem

Check = tuple[str, Any, bool, str]
"""(option, its value, whether it is sound, how to fix it)."""


def check_options(method: str, *checks: Check) -> None:
    """Refuse options that are out of range.

    Raises:
        ConfigError: lists all of them.
    """
    problems = [Problem(f"{method}.{name}", repr(value), fix) for name, value, sound, fix in checks if not sound]
    if problems:
        raise ConfigError(*problems)


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_positive(value: Any) -> bool:
    """Whether a value is a finite number above 0."""
    return is_number(value) and value > 0


def is_count(value: Any) -> bool:
    """Whether a value is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
