"""Splits and parts: which is chosen, that parts share no sample, and what is refused."""

from __future__ import annotations

import logging
from typing import Any

import datasets
import pytest

from nio_hf.data.parts import choose_split, limit, name_eval_split, set_aside
from nio_hf.data.sources import Rows
from nio_hf.errors import DataError

COUNT = 1000


def rows_of(count: int = COUNT, streaming: bool = False) -> Rows:
    rows = datasets.Dataset.from_dict({"number": list(range(count)), "odd": [n % 2 for n in range(count)]})
    rows = rows.cast_column("odd", datasets.ClassLabel(names=["no", "yes"]))
    return rows.to_iterable_dataset() if streaming else rows


def numbers(rows: Rows) -> list[int]:
    return [row["number"] for row in rows]


def digest(row: dict[str, Any]) -> int:
    """Spread over [0, 2^32) evenly, the largest numbers lowest."""
    return (COUNT - 1 - row["number"]) * 2**32 // COUNT


def divided(rows: Rows, fraction: float, **options: Any) -> tuple[list[int], list[int]]:
    settings = {"digest": digest, "seed": 1, "name": "numbers", "need": "shines", **options}
    train, evaluation = set_aside(rows, fraction, **settings)
    return numbers(train), numbers(evaluation)


# Splits


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_that_is_missing_or_empty_is_refused(streaming: bool) -> None:
    nothing = rows_of(3, streaming).filter(lambda row: False)
    splits = {"train": rows_of(3, streaming), "test": nothing}
    assert choose_split(splits, "train", "some_split", "numbers") is splits["train"]
    for split, message in (
        ("other", "some_split: 'other' is no split of numbers. Choose one of train, test."),
        ("test", "some_split: the split 'test' of numbers is empty. Give a split with samples."),
    ):
        with pytest.raises(DataError) as raised:
            choose_split(splits, split, "some_split", "numbers")
        assert str(raised.value) == message


def test_a_stream_that_cannot_be_read_is_refused() -> None:
    def broken() -> Any:
        raise OSError("gone\naway.")
        yield

    splits = {"train": datasets.IterableDataset.from_generator(broken)}
    with pytest.raises(DataError) as raised:
        choose_split(splits, "train", "some_split", "numbers")
    assert str(raised.value) == ("some_split: the split 'train' of numbers cannot be read: gone away. Check its files.")


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_the_validation_split_is_evaluated_on_unless_another_is_asked_for(name: str) -> None:
    splits = {"train": rows_of(), "test": rows_of(), name: rows_of()}
    assert name_eval_split(splits, "train", None, False) == name
    assert name_eval_split(splits, "train", "test", False) == "test"
    assert name_eval_split(splits, "train", "test", True) is None
    assert name_eval_split(splits, name, None, False) is None
    assert name_eval_split({"train": rows_of(), "test": rows_of()}, "train", None, False) is None


# Parts


@pytest.mark.parametrize("streaming", [False, True])
def test_parts_share_no_sample_and_have_their_sizes(streaming: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="nio_hf"):
        train, evaluation = divided(rows_of(streaming=streaming), 0.25)
    assert len(evaluation) == 250
    assert sorted(train + evaluation) == list(range(COUNT))
    assert caplog.messages == ["numbers: 0.25 of the training split is set aside to evaluate on."]


def test_the_choice_is_random_by_its_seed_and_takes_the_same_share_of_each_class() -> None:
    chosen = [divided(rows_of(), 0.3, seed=seed, stratify_by="odd")[1] for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1]
    assert set(chosen[0]) != set(chosen[2])
    assert [sum(number % 2 for number in part) for part in chosen] == [150, 150, 150]


def test_the_digest_alone_decides_about_a_sample_of_a_stream() -> None:
    assert divided(rows_of(streaming=True), 0.25, seed=9)[1] == list(range(750, COUNT))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_a_fraction_that_is_none_is_refused(fraction: float, streaming: bool) -> None:
    with pytest.raises(DataError) as raised:
        divided(rows_of(streaming=streaming), fraction)
    assert str(raised.value) == f"eval_fraction: {fraction}. Give a part in (0, 1), or an eval_split."


def test_a_part_of_nothing_is_refused_with_what_it_needs() -> None:
    with pytest.raises(DataError) as raised:
        divided(rows_of(1), 0.5)
    message = str(raised.value)
    assert message.startswith("eval_fraction: 0.5 of 1 samples of numbers cannot be set aside (")
    assert message.endswith("). Give a part in (0, 1) that shines, or an eval_split.")


# Limits


def test_a_limit_chooses_at_random_by_its_seed() -> None:
    few, again, other = (numbers(limit(rows_of(), 50, seed)) for seed in (1, 1, 2))
    assert few == again
    assert set(few) != set(other)
    assert len(set(few)) == 50
    assert few != sorted(few)


def test_a_limit_takes_the_first_samples_of_a_stream() -> None:
    assert numbers(limit(rows_of(streaming=True), 5, seed=1)) == list(range(5))


@pytest.mark.parametrize("streaming", [False, True])
def test_no_limit_or_a_large_one_takes_nothing_away(streaming: bool) -> None:
    rows = rows_of(streaming=streaming)
    assert limit(rows, None, seed=1) is rows
    assert sorted(numbers(limit(rows, 2 * COUNT, seed=1))) == list(range(COUNT))
