"""The batches of NIO depend on seed and number alone."""

import contextlib
import functools
import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import ByT5Tokenizer, DataCollatorForLanguageModeling

from nio_hf.durable.isolation import isolated_random_state
from nio_hf.errors import DataError
from nio_hf.trainer.sampling import EpochSampler, NIOBatchSampler, SeededDataset, SeededStream, nio_dataloader

SETTINGS = {"batch_size": 4, "report_batches": 1, "further_batches": 5, "seed": 5}


def batches_of(data, collate=torch.stack, workers=0, **settings):
    return list(nio_dataloader(data, collate, num_workers=workers, **{**SETTINGS, **settings}))


def seed_all(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def global_state():
    return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]


class Augmented(Dataset):
    """Its samples are random, as augmentation is."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()), random.random(), np.random.rand()], dtype=torch.float64)


def test_samples_of_the_report_are_never_searched_on_and_the_others_equally_often():
    batches = [[index for _, index in batch] for batch in NIOBatchSampler(40, 8, 2, 12, seed=3)]
    reported = {index for batch in batches[:2] for index in batch}
    searched = [index for batch in batches[2:] for index in batch]
    assert len(reported) == 16
    assert not reported & set(searched)
    counts = np.bincount(searched, minlength=40)[sorted(set(range(40)) - reported)]
    assert set(counts.tolist()) == {4}


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_does_not_depend_on_workers_or_global_state(workers):
    seed_all(0)
    expected = torch.cat(batches_of(Augmented()))
    seed_all(1)
    assert torch.equal(expected, torch.cat(batches_of(Augmented(), workers=workers)))


class Fetched(Augmented):
    """The same, fetched in batches; `draws` tells whether it is random."""

    def __init__(self, draws):
        self.draws = draws
        self.fetches = []

    def __getitem__(self, index):
        return super().__getitem__(index) if self.draws else torch.tensor([index, 0.0, 0.0, 0.0]).double()

    def __getitems__(self, indices):
        self.fetches.append(len(indices))
        return [self[index] for index in indices]


def test_batches_are_fetched_whole_where_nothing_is_drawn_and_by_sample_where_it_is():
    plain, augmented = Fetched(draws=False), Fetched(draws=True)
    assert len(batches_of(plain)) == 6
    assert plain.fetches == [4] * 6
    assert torch.equal(torch.cat(batches_of(augmented)), torch.cat(batches_of(Augmented())))
    assert augmented.fetches == [4]


def test_too_little_data_is_refused_with_the_numbers():
    message = r"23 samples for 2 report batches and one more of 8\. Lower nio_batch_size to 7, or nio_report_batches"
    with pytest.raises(DataError, match=message):
        NIOBatchSampler(23, 8, 2, 1, seed=0)
    assert len(list(NIOBatchSampler(16, 8, 2, 0, seed=0))) == 2
    with pytest.raises(DataError, match=r"15 samples for 2 report batches of 8\. Lower nio_batch_size to 7"):
        NIOBatchSampler(15, 8, 2, 0, seed=0)


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    sampler, again = EpochSampler(20, seed=1), EpochSampler(20, seed=1)
    first = list(sampler)
    assert sorted(index for _, index in first) == list(range(20))
    sampler.set_epoch(3)
    fourth = list(sampler)
    assert fourth != first
    again.set_epoch(3)
    assert list(again) == fourth
    assert [index for _, index in EpochSampler(20, seed=2)] != [index for _, index in first]
    assert {number for number, _ in fourth} == {3}


@pytest.mark.parametrize(("samples", "repeats"), [(12, 3), (13, 3), (5, 4)])
def test_repeated_augmentation_draws_some_samples_several_times_and_no_draw_twice(samples, repeats):
    sampler = EpochSampler(samples, seed=0, repeats=repeats)
    draws = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        of_epoch = list(sampler)
        assert len(of_epoch) == len(sampler) == samples
        counts = np.bincount([index for _, index in of_epoch])
        assert counts.max() == repeats
        assert (counts > 0).sum() == -(-samples // repeats)
        draws += of_epoch
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("workers", [0, 2])
def test_draws_of_the_data_leave_those_of_training_alone(workers):
    before = global_state()
    data, sampler = SeededDataset(Augmented(), seed=0), EpochSampler(40, seed=0)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(data, 8, sampler=sampler, num_workers=workers, generator=generator, collate_fn=torch.stack)
    samples = torch.cat(list(loader))
    assert global_state() == before
    assert len(samples[:, 1].unique()) == 40
    for (number, index), sample in zip(EpochSampler(40, seed=0), samples, strict=True):
        assert torch.equal(data[number, index], sample)


class Stream(IterableDataset):
    """Ten random samples, in an order that depends on the epoch."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for index in range(10):
            yield torch.tensor([(index + self.epoch) % 10, torch.rand(()), random.random()], dtype=torch.float64)


def pass_of(seed, epoch):
    torch.manual_seed(epoch + 10 * seed)
    stream = SeededStream(Stream(), seed)
    stream.set_epoch(epoch)
    return torch.stack(list(stream))


def test_a_stream_is_augmented_by_seed_epoch_and_position():
    assert torch.equal(pass_of(0, 1), pass_of(0, 1))
    assert pass_of(0, 1)[0, 0] == 1
    for other in (pass_of(0, 2), pass_of(1, 1)):
        assert not torch.equal(pass_of(0, 1)[:, 1], other[:, 1])


def test_an_endless_stream_begins_anew_in_the_order_and_with_the_draws_of_the_next_pass():
    endless = list(itertools.islice(SeededStream(Stream(), 0, endless=True), 25))
    assert torch.equal(torch.stack(endless), torch.cat([pass_of(0, number) for number in range(3)])[:25])


class Texts(Dataset):
    """Tokens of several lengths."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"input_ids": list(range(10, 30 + index))}


def masking(**settings):
    return DataCollatorForLanguageModeling(ByT5Tokenizer(mask_token="<extra_id_0>"), **settings)


def global_noise(samples):
    draws = [random.random(), np.random.rand(), float(torch.rand(()))]
    return torch.tensor([*draws, sum(len(sample["input_ids"]) for sample in samples)], dtype=torch.float64)


class OwnNoise:
    """Draws from generators of its own, kept in several places; takes the samples apart."""

    def __init__(self):
        self.torch = torch.Generator().manual_seed(0)
        self.others = {"python": [random.Random(0)], "numpy": (np.random.default_rng(0), np.random.RandomState(0))}
        self.itself = self

    def __call__(self, samples):
        (python,), (modern, legacy) = self.others["python"], self.others["numpy"]
        draws = [float(torch.rand((), generator=self.torch)), python.random(), modern.random(), legacy.randn()]
        return torch.tensor([*draws, sum(len(sample.pop("input_ids")) for sample in samples)], dtype=torch.float64)


class LateNoise(OwnNoise):
    """Makes its generators when it is called first."""

    def __init__(self):
        pass

    def __call__(self, samples):
        if not vars(self):
            super().__init__()
        return super().__call__(samples)


def bound_noise(samples, generator):
    return torch.tensor([generator.random(), len(samples)], dtype=torch.float64)


COLLATORS = {
    "masking": masking,
    "masking with a seed": lambda: masking(seed=7),
    "global": lambda: global_noise,
    "own": OwnNoise,
    "late": LateNoise,
    "partial": lambda: functools.partial(bound_noise, generator=random.Random(0)),
    "no state": lambda: functools.partial(lambda samples, source: len(samples), source=random.SystemRandom()),
}


@pytest.mark.parametrize("name", COLLATORS)
def test_collation_depends_on_seed_and_number_alone(name):
    def batches(collate, workers, **settings):
        found = batches_of(Texts(), collate, workers, **settings)
        named = [batch if hasattr(batch, "items") else {"batch": torch.as_tensor(batch)} for batch in found]
        return [{key: tensor.tolist() for key, tensor in batch.items()} for batch in named]

    expected = batches(COLLATORS[name](), 0)
    assert len(expected) == 6
    for workers in (0, 1, 2):
        seed_all(workers)
        before = global_state()
        collate = COLLATORS[name]()
        assert batches(collate, workers) == expected
        assert batches(collate, workers) == expected
        assert global_state() == before
    assert batches(COLLATORS[name](), 2, further_batches=2) == expected[:3]
    if name != "no state":
        assert batches(COLLATORS[name](), 0, seed=6) != expected


@pytest.mark.parametrize("workers", [0, 2])
def test_generators_of_a_collator_go_on_where_they_were(workers):
    collate, untouched = OwnNoise(), OwnNoise()
    batches_of(Texts(), collate, workers)
    assert torch.equal(collate([Texts()[0]]), untouched([Texts()[0]]))


@pytest.mark.parametrize("fails", [False, True])
def test_in_isolation_generators_go_on_as_if_nothing_had_been_drawn(fails):
    collate, untouched, before = OwnNoise(), OwnNoise(), global_state()
    expected = pytest.raises(KeyError) if fails else contextlib.nullcontext()
    with expected, isolated_random_state(torch.device("cpu"), collate):
        first = [noise([Texts()[0]]).tolist() for noise in (collate, global_noise)]
        assert first != [noise([Texts()[0]]).tolist() for noise in (collate, global_noise)]
        if fails:
            raise KeyError
    assert global_state() == before
    assert torch.equal(collate([Texts()[0]]), untouched([Texts()[0]]))


def test_batches_of_a_collator_differ_from_each_other():
    for collate in (global_noise, OwnNoise()):
        draws = torch.stack(batches_of(Texts(), collate))[:, :3]
        assert len(draws.unique()) == draws.numel()


class OwnAugmentation(Augmented):
    """Its samples are drawn from generators that it owns."""

    def __init__(self):
        self.numpy, self.python = np.random.default_rng(0), random.Random(0)

    def __getitem__(self, index):
        return torch.tensor([index, self.numpy.random(), self.python.random()], dtype=torch.float64)

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def test_augmentation_from_generators_of_the_data_set_does_not_depend_on_workers():
    data = OwnAugmentation()
    first, *others = (torch.stack(batches_of(data, workers=workers)) for workers in (0, 0, 1, 2))
    assert all(torch.equal(batches, first) for batches in others)
    assert len(first[..., 1:].unique()) == 2 * 6 * 4
    assert torch.equal(data[0], OwnAugmentation()[0])


def test_batches_of_a_stream_depend_on_seed_and_number_alone():
    def noise(samples):
        return torch.stack(samples) + torch.rand(()) + random.random() + np.random.rand()

    found = []
    for workers in (0, 0, 2, 2):
        seed_all(workers)
        before = global_state()
        found.append(torch.stack(batches_of(Stream(), noise, workers)))
        assert global_state() == before
    assert len(found[0]) == 2
    assert all(torch.equal(batches, found[0]) for batches in found)
