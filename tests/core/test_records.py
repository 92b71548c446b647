"""Records that JSON has held."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, Literal

import pytest

from nio_hf.core.records import restored


@dataclasses.dataclass(frozen=True)
class Inner:
    """A record in a record."""

    numbers: tuple[float, ...]
    parts: tuple[Inner, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    """One of each kind of field."""

    name: Literal["a", "b"]
    pair: tuple[float, float] | None
    inner: Inner | None
    by_name: dict[str, tuple[float, ...]]
    records: tuple[Inner, ...]
    anything: Any = None


@pytest.mark.parametrize(
    "record",
    [
        Outer("a", (0.1, 1 / 3), Inner((1.0,), (Inner((2.0,)),)), {"x": (1e-17,)}, (Inner(()), Inner((math.pi,)))),
        Outer("b", None, None, {}, (), {"free": 1}),
    ],
)
def test_a_record_survives_json(record):
    assert restored(Outer, json.loads(json.dumps(dataclasses.asdict(record)))) == record


def test_a_field_that_is_missing_or_unknown_is_an_error():
    for fields in ({}, {"numbers": [], "more": 1}):
        with pytest.raises((TypeError, KeyError)):
            restored(Inner, fields)
