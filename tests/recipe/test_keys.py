"""Values against the annotations of dataclass fields."""

import enum
from typing import Any, Literal

import pytest

from nio_hf.recipe.keys import check_value, unknown_key
from nio_hf.recipe.strict_yaml import Setting


class Strategy(enum.Enum):
    NO = "no"
    STEPS = "steps"


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (3, int, 3),
        (3, float | None, 3.0),
        (3, int | float, 3),
        (None, float | None, None),
        ("none", float | None, None),
        ("none", Literal["radam", "muon"] | None, None),
        ("none", Literal["none", "resized"] | None, "none"),
        ("none", None | str | list[str], "none"),
        ("no", Strategy | str, "no"),
        ("gc", Literal["gc", "variance"], "gc"),
        ([1], list[int] | None, [1]),
        ("all", None | str | list[str], "all"),
    ],
)
def test_values_of_the_right_type_pass(value, annotation, expected):
    result, problem = check_value(Setting(value, "key"), annotation)
    assert problem is None
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        ("1e-3", float, "key: '1e-3', text. Give a number, without quotes."),
        ("fast", float, "key: 'fast', text. Give a number."),
        (1.5, int, "key: 1.5, a number. Give a whole number."),
        (True, int, "key: True, true or false. Give a whole number."),
        (1, bool, "key: 1, a whole number. Give true or false."),
        ("yes", bool, "key: 'yes', text. Give true or false."),
        (5, str | None, "key: 5, a whole number. Give text or null."),
        ([1], dict[str, Any], "key: [1], a list. Give a mapping."),
        ({"a": 1}, dict[str, str] | str | None, "key.a: 1, a whole number. Give text."),
        ([1], str | list[str] | None, "key[0]: 1, a whole number. Give text."),
        ([1.0, "a"], list[float], "key[1]: 'a', text. Give a number."),
        (5, str | list[str] | None, "key: 5, a whole number. Give text or a list or null."),
        ("sometimes", Strategy | str, "key: 'sometimes'. Choose one of no, steps."),
        (False, Strategy | str, "key: False, true or false. Give no or steps."),
    ],
)
def test_values_of_another_type_are_refused_with_the_one_wanted(value, annotation, message):
    _, problem = check_value(Setting(value, "key"), annotation)
    assert str(problem) == message


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("batch_size", "Did you mean 'global_batch_size', 'per_device_train_batch_size' or 'nio_batch_size'?"),
        ("lr", "Did you mean 'learning_rate' or 'nio_lr'?"),
        ("wd", "Did you mean 'weight_decay'?"),
        ("weight_decy", "Did you mean 'weight_decay'?"),
        ("zzzz", "Remove it"),
    ],
)
def test_all_keys_that_may_be_meant_are_named(key, fix):
    known = ["learning_rate", "global_batch_size", "per_device_train_batch_size", "weight_decay", "nio_batch_size"]
    assert unknown_key("x", key, [*known, "nio_lr"]).fix == fix
