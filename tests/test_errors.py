"""Errors: every problem is in the message, also in the text that a worker of a data loader passes."""

import pytest
from torch.utils.data import DataLoader, Dataset

from nio_hf.errors import DataError, Problem

PROBLEMS = (Problem("a", "found", "Fix it"), Problem("b", "also found", "Is it so?"))


class Failing(Dataset[int]):
    def __init__(self, problems):
        self.problems = problems

    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise DataError(*self.problems)


@pytest.mark.parametrize("count", [1, 2])
def test_the_message_is_the_same_from_a_worker(count):
    here = DataError(*PROBLEMS[:count])
    with pytest.raises(DataError) as raised:
        list(DataLoader(Failing(PROBLEMS[:count]), num_workers=1))
    assert str(raised.value) == str(here)
    assert raised.value.problems == ()
    assert here.problems == PROBLEMS[:count]


def test_an_error_without_a_problem_is_a_mistake():
    with pytest.raises(TypeError, match="needs at least one Problem"):
        DataError()
