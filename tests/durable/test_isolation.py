"""Random numbers drawn beside a training do not change it."""

import contextlib
import random

import numpy as np
import pytest
import torch

from nio_hf.durable.isolation import isolated_random_state


class Holder:
    """Holds generators as data sets do: as attributes, and inside other attributes."""

    def __init__(self):
        self.numpy = np.random.default_rng(0)
        self.inner = {"transforms": [torch.Generator().manual_seed(0), random.Random(0)]}
        self.legacy = np.random.RandomState(0)
        self.itself = self

    def draw(self):
        own, python = self.inner["transforms"]
        return [
            float(self.numpy.random()),
            float(torch.rand((), generator=own)),
            python.random(),
            float(self.legacy.randn()),
            float(torch.rand(())),
            random.random(),
            float(np.random.rand()),
        ]


@pytest.mark.parametrize("fails", [False, True])
def test_generators_go_on_as_if_nothing_had_been_drawn(fails):
    def draws(isolated):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        holder = Holder()
        if isolated:
            expected = pytest.raises(KeyError) if fails else contextlib.nullcontext()
            with expected, isolated_random_state(torch.device("cpu"), holder):
                assert holder.draw() != holder.draw() != holder.draw()
                if fails:
                    raise KeyError
        return holder.draw()

    assert draws(isolated=True) == draws(isolated=False)
