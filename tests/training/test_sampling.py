"""The batches of NIO depend on seed and number alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from nio_hf.errors import DataError
from nio_hf.training.sampling import NIOBatchSampler, nio_dataloader


class Augmented(Dataset[Any]):
    """Its samples are random, as augmentation is."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.rand(()), random.random(), np.random.rand()], dtype=torch.float64)


def test_held_out_samples_are_never_optimised_on_and_the_others_equally_often() -> None:
    batches = [[index for _, index in batch] for batch in NIOBatchSampler(40, 8, 2, 12, seed=3)]
    held_out = {index for batch in batches[:2] for index in batch}
    optimised = [index for batch in batches[2:] for index in batch]
    assert len(held_out) == 16
    assert not held_out & set(optimised)
    counts = np.bincount(optimised, minlength=40)[sorted(set(range(40)) - held_out)]
    assert set(counts.tolist()) == {4}


def test_a_batch_depends_on_seed_and_number_only() -> None:
    short, long = (list(NIOBatchSampler(40, 8, 2, n, seed=3)) for n in (3, 9))
    assert short == long[:5]
    assert short != list(NIOBatchSampler(40, 8, 2, 3, seed=4))


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_does_not_depend_on_workers_or_global_state(workers: int) -> None:
    def draw(seed: int, num_workers: int) -> torch.Tensor:
        torch.manual_seed(seed)
        settings = {"batch_size": 8, "holdout_batches": 1, "iterations": 3, "seed": 5, "num_workers": num_workers}
        return torch.cat([torch.stack(batch) for batch in nio_dataloader(Augmented(), list, **settings)])

    assert torch.equal(draw(0, 0), draw(1, workers))


class Fetched(Augmented):
    """The same, fetched in batches; `draws` tells whether it is random."""

    def __init__(self, draws: bool) -> None:
        self.draws = draws
        self.fetches: list[int] = []

    def __getitem__(self, index: int) -> torch.Tensor:
        return super().__getitem__(index) if self.draws else torch.tensor([index, 0.0, 0.0, 0.0]).double()

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        self.fetches.append(len(indices))
        return [self[index] for index in indices]


def test_batches_are_fetched_whole_where_nothing_is_drawn_and_by_sample_where_it_is() -> None:
    settings = {"batch_size": 8, "holdout_batches": 1, "iterations": 3, "seed": 5}
    plain, augmented = Fetched(draws=False), Fetched(draws=True)
    assert len(list(nio_dataloader(plain, list, **settings))) == 4
    assert plain.fetches == [8] * 4
    fetched = torch.cat([torch.stack(batch) for batch in nio_dataloader(augmented, list, **settings)])
    by_sample = torch.cat([torch.stack(batch) for batch in nio_dataloader(Augmented(), list, **settings)])
    assert torch.equal(fetched, by_sample)
    assert augmented.fetches == [8]


def test_too_little_data_is_refused_with_the_numbers() -> None:
    with pytest.raises(DataError, match="23 samples for 2 held-out batches and one more of 8"):
        NIOBatchSampler(23, 8, 2, 1, seed=0)
