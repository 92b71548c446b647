"""Batches of any structure, and parts of them."""

import collections
import shelve

import pytest
import torch

from nio_hf.core.batches import all_ignored_labels, batch_size, chunks, content_of, take, tensors_equal, to_device
from nio_hf.errors import DataError

Pair = collections.namedtuple("Pair", "inputs labels")
NESTED = {
    "images": torch.arange(8.0).view(4, 2),
    "masks": {"even": torch.tensor([0, 2, 4, 6])},
    "names": ["a", "b", "c", "d"],
    "pair": Pair(torch.arange(4), torch.arange(4, 8)),
    "temperature": torch.tensor(0.5),
    "task": "digits",
}


def test_a_batch_may_be_nested():
    assert batch_size(NESTED) == 4
    assert batch_size(torch.zeros(3, 2)) == 3
    assert batch_size((torch.zeros(5), torch.zeros(5, 1))) == 5


def test_samples_are_taken_from_every_part_of_a_batch():
    taken = take(NESTED, [3, 0, 3])
    assert taken["images"].tolist() == [[6.0, 7.0], [0.0, 1.0], [6.0, 7.0]]
    assert taken["masks"]["even"].tolist() == [6, 0, 6]
    assert taken["names"] == ["d", "a", "d"]
    assert taken["pair"].inputs.tolist() == [3, 0, 3]
    assert taken["pair"].labels.tolist() == [7, 4, 7]
    assert (taken["temperature"], taken["task"]) == (torch.tensor(0.5), "digits")


def test_a_mapping_that_shares_its_entries_with_its_copies_is_not_written_to():
    batch = shelve.Shelf({})
    batch["x"] = torch.arange(6)
    assert take(batch, [1, 2])["x"].tolist() == [1, 2]
    assert batch_size(batch) == 6


@pytest.mark.parametrize(("size", "lengths"), [(None, [4]), (4, [4]), (9, [4]), (3, [3, 1]), (1, [1, 1, 1, 1])])
def test_chunks_are_the_batch_in_order(size, lengths):
    parts = list(chunks(NESTED, size))
    assert [batch_size(part) for part in parts] == lengths
    assert torch.equal(torch.cat([part["images"] for part in parts]), NESTED["images"])


def test_a_batch_moves_to_a_device_with_all_its_tensors():
    moved = to_device(NESTED, torch.device("meta"))
    assert moved["images"].is_meta
    assert moved["masks"]["even"].is_meta
    assert moved["names"] == NESTED["names"]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"a": torch.zeros(3), "b": {"c": torch.zeros(2)}}, r"batch\['a'\] 3, batch\['b'\]\['c'\] 2"),
        ((torch.zeros(3), torch.zeros(4)), r"batch\[0\] 3, batch\[1\] 4"),
        ({"a": torch.tensor(1.0)}, "no tensor with a sample dimension in a dict"),
        ("text", "no tensor with a sample dimension in a str"),
    ],
)
def test_batches_without_one_size_are_refused(batch, message):
    with pytest.raises(DataError, match=message):
        batch_size(batch)


def test_batches_are_compared_by_their_tensors():
    other = {**NESTED, "pair": (torch.arange(4), torch.arange(5, 9))}
    assert tensors_equal(NESTED, take(NESTED, range(4)))
    assert not tensors_equal(NESTED, other)
    assert not tensors_equal(NESTED, take(NESTED, range(3)))


@pytest.mark.parametrize("ignored", [-100, 255])
def test_ignored_labels_are_found_where_batches_keep_labels(ignored):
    inputs, labels = torch.zeros(2, 3), torch.full((2, 4, 4), ignored)
    partly = labels.clone()
    partly[0, 0, 0] = 1
    for all_ignored, batch_of in [(True, labels), (False, partly)]:
        assert all_ignored_labels({"pixels": inputs, "labels": batch_of}) == all_ignored
        assert all_ignored_labels({"pixels": inputs, "target": {"mask": batch_of}}) == all_ignored
        assert all_ignored_labels((inputs, batch_of)) == all_ignored
    assert not all_ignored_labels({"pixels": inputs, "tokens": labels})
    assert not all_ignored_labels({"pixels": inputs, "labels": labels.float()})
    assert not all_ignored_labels({"labels": labels, "labels of the other task": partly})
    assert not all_ignored_labels(inputs)


def test_the_content_of_a_batch_tells_it_from_another_order_and_another_place():
    content = content_of(NESTED)
    assert content == content_of(take(NESTED, range(4)))
    assert content != content_of(take(NESTED, [1, 0, 2, 3]))
    assert content != content_of({**NESTED, "pair": (NESTED["pair"][1], NESTED["pair"][0])})
