"""A stream of batches that ends in one known way and keeps its held-out batches to itself."""

import logging
import random

import torch

from nio_hf.core.stream import BatchStream


class Numbered:
    """A re-iterable of batches that hold their own number; counts how often it is iterated."""

    def __init__(self, count, samples=2):
        self.batches = [torch.full((samples,), number) for number in range(count)]
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


def numbers(stream, count):
    batches = [stream.next() for _ in range(count)]
    return [None if batch is None else int(batch[0]) for batch in batches]


def test_a_re_iterable_starts_again_without_the_batches_set_aside():
    data = Numbered(5)
    stream = BatchStream(data, 2, 8)
    assert [int(batch[0]) for batch in stream.set_aside(2)] == [0, 1]
    assert numbers(stream, 8) == [2, 3, 4, 2, 3, 4, 2, 3]
    assert data.passes == 3


def test_an_iterator_ends():
    stream = BatchStream(iter(Numbered(5)), 2, 8)
    stream.set_aside(3)
    assert numbers(stream, 4) == [3, 4, None, None]


def test_small_batches_are_passed_over(caplog):
    data = [torch.zeros(4), torch.full((3,), 1), torch.full((4,), 2)]
    stream = BatchStream(data, 4, 3)
    with caplog.at_level(logging.WARNING):
        assert numbers(stream, 3) == [0, 2, 0]
    assert "A batch of 3 samples is passed over: fewer than 4 sub-batches" in caplog.text


class Shuffled(Numbered):
    """Its batches come in another order each time."""

    def __iter__(self):
        self.passes += 1
        return iter(random.Random(self.passes).sample(self.batches, len(self.batches)))


class Sized(Shuffled):
    """The same with a length."""

    def __len__(self):
        return len(self.batches)


def test_data_in_another_order_end_before_held_out_batches_come_back(caplog):
    stream = BatchStream(Shuffled(6), 2, 12)
    held_out = {int(batch[0]) for batch in stream.set_aside(2)}
    with caplog.at_level(logging.WARNING):
        *delivered, last = numbers(stream, 5)
    assert set(delivered) == set(range(6)) - held_out
    assert last is None
    assert "would optimise on held-out samples" in caplog.text
    assert numbers(stream, 3) == [None, None, None]


def test_data_of_known_length_give_their_first_pass_again():
    stream = BatchStream(Sized(6), 2, 12)
    held_out = {int(batch[0]) for batch in stream.set_aside(2)}
    delivered = numbers(stream, 10)
    assert set(delivered[:4]) == set(range(6)) - held_out
    assert delivered == (3 * delivered[:4])[:10]
