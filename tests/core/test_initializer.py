"""The whole run on every family: what it changes, what it leaves alone, what it reports."""

import re

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nio_hf import NIOConfig, grad_cosine, initialize
from nio_hf.core.initializer import INITIALISED
from nio_hf.errors import ConfigError
from tests import zoo
from tests.core.cases import FAMILIES, PER_TENSOR, Case, batches_of, case, differences, state, unchanged
from tests.versions import checkpoint_activations

SHORT = {**PER_TENSOR, "iterations": 3, "report_batches": 2, "sub_batches": 2, "lr": 0.05, "curvature": "exact"}
COMPUTED = {"report_batches": 2, "sub_batches": 2, "least_norm": 0.2}


def run(name, made=None, batches=None, **settings):
    made = made or case(name)
    batches = batches_of(name, 5) if batches is None else batches
    return initialize(made.model, batches, made.loss_fn, NIOConfig(**{**SHORT, **settings}))


def generator_states():
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]


@pytest.mark.parametrize("search", ["published", "balance"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_scaled_in_place_and_otherwise_left_alone(name, search):
    made = case(name)
    next(iter(made.model.children())).eval()
    made.loss_fn(made.model, made.batch)
    first = next(made.model.parameters())
    first.grad = torch.ones_like(first)
    before, generators = state(made.model), generator_states()
    batches = batches_of(name, 5)
    config = NIOConfig(**(SHORT if search == "published" else COMPUTED))
    result = initialize(made.model, batches, made.loss_fn, config)

    after = state(made.model)
    for parameter, omega in result.scales.items():
        key = f"{parameter}: value"
        assert torch.equal(after[key], before[key] * torch.tensor(omega)), parameter
    assert set(differences(before, after)) <= {f"{parameter}: value" for parameter in result.scales}
    assert generator_states() == generators
    # The weights of a ResNet have twice the variance that keeps that of their inputs, and nothing becomes smaller.
    is_changed = (name, search) != ("resnet", "balance")
    assert (max(abs(omega - 1) for omega in result.scales.values()) > 0.04) == is_changed
    if search == "balance":
        assert result.status == ("changed" if is_changed else "unchanged")

    for index, part in enumerate(result.after.parts):
        again = grad_cosine(made.model, batches[index], made.loss_fn, sub_batches=2)
        assert (again.value, again.norms, again.loss) == (part.value, part.norms, part.loss)
    assert f"{result.before.value:.4f} -> {result.after.value:.4f}" in result.message
    assert (result.method, result.title) == ("nio", "NIO")


@pytest.mark.parametrize("name", ["vit", "swin", "gpt2"])
def test_activation_checkpointing_learns_the_same_scales(name):
    checkpointed = case(name)
    checkpoint_activations(checkpointed.model)
    result = run(name, checkpointed)
    assert result.scales == pytest.approx(run(name).scales, abs=1e-5)


def test_a_loss_may_take_keys_out_of_its_batch():
    made = case("vit")

    def popping(model, batch):
        labels = batch.pop("labels")
        return zoo.image_loss(model, {**batch, "labels": labels})

    assert run("vit", Case(made.model, made.batch, popping)).scales == run("vit").scales


@pytest.mark.parametrize("settings", [{**SHORT, "curvature": "finite_difference"}, {**COMPUTED, "loss_bound": 1e-9}])
def test_a_random_loss_is_the_same_function_each_time_a_sub_batch_is_computed(settings):
    made, draws = case("mlp"), {}

    def noisy(model, batch):
        noise = torch.randn_like(batch[0])
        draws.setdefault(tuple(batch[0][:, 0].tolist()), []).append(noise[0, 0].item())
        return made.loss_fn(model, (batch[0] + noise, batch[1]))

    initialize(made.model, batches_of("mlp", 5), noisy, NIOConfig(**settings))
    several = [values for values in draws.values() if len(values) > 1]
    assert len(several) >= 4
    assert all(len(set(values)) == 1 for values in several)
    assert len({values[0] for values in several}) == len(several), "each sub-batch draws its own"


def test_held_out_batches_are_never_optimised_on_and_data_start_again():
    optimised, held_out = _samples_seen(_numbered(4), iterations=5, report_batches=2)
    assert held_out == set(range(16))
    assert [{sample // 8 for sample in batch} for batch in optimised] == [{2}, {3}, {2}, {3}, {2}]
    assert all(sorted(batch) == sorted(set(batch)) for batch in optimised)
    assert optimised[0] != optimised[2], "each iteration has its own order"


@pytest.mark.parametrize("report", [None, slice(2, 4)])
def test_scales_are_computed_on_the_report_batches_alone(report):
    made, data = case("mlp"), _numbered(6)
    seen = set()

    def recorded(model, batch):
        seen.update((batch[2] // 8).tolist())
        return made.loss_fn(model, batch[:2])

    given = None if report is None else data[report]
    result = initialize(made.model, data, recorded, NIOConfig(**COMPUTED), report=given)
    assert result.history
    assert seen == ({0, 1} if report is None else {2, 3})


def test_given_report_batches_leave_all_data_to_optimise_on():
    data = _numbered(3)
    optimised, held_out = _samples_seen(data[:2], iterations=3, report=data[2:])
    assert held_out == set(range(16, 24))
    assert [{sample // 8 for sample in batch} for batch in optimised] == [{0}, {1}, {0}]


def test_an_iterator_that_ends_keeps_what_was_learned():
    result = run("mlp", batches=iter(batches_of("mlp", 4)), iterations=9)
    assert result.status == "data_exhausted"
    assert "The data ended before the 9 iterations were done" in result.message
    assert len(result.history) == 2
    other = run("mlp", batches=iter(batches_of("mlp", 4)), iterations=2)
    assert result.scales == other.scales
    assert any(omega != 1 for omega in other.scales.values())


@pytest.mark.parametrize("name", ["vit", "swin", "resnet", "gpt2"])
@pytest.mark.parametrize("search", ["balance", "published"])
def test_one_scale_for_the_model_leaves_vectors_alone(name, search):
    made = case(name)
    before = {key: value.clone() for key, value in made.model.state_dict().items()}
    config = NIOConfig(**COMPUTED, search=search, groups="model", loss_bound=2.0, iterations=2, lr=0.1)
    result = initialize(made.model, batches_of(name, 4), made.loss_fn, config)
    (omega,) = set(result.scales.values())
    assert (omega == 1) == (name == "resnet" and search == "balance")
    for key, parameter in made.model.named_parameters():
        assert torch.equal(parameter, before[key] * torch.tensor(omega if key in result.scales else 1.0))
        assert (key in result.scales) <= (parameter.ndim >= 2)
    assert {tensor.reason for tensor in result.excluded if len(tensor.shape) < 2} <= {"vector", "zero"}
    said = "No scale was changed" if omega == 1 else f"All scaled weights were multiplied by {omega:.3g}"
    assert said in result.message


def test_only_what_a_mapping_names_is_scaled():
    groups = {"attention": r"attention.*weight", "norms": r"layernorm_before\.weight"}
    result = run("vit", groups=groups, scaled_tensors="weights")
    names = [name for name, parameter in case("vit").model.named_parameters() if parameter.any()]
    named = [name for name in names if re.search("attention.*weight|norm_before.weight", name)]
    assert list(result.scales) == named
    assert {tensor.group for tensor in result.tensors} == set(groups)
    assert [tensor.name for tensor in result.excluded if tensor.reason == "no group"] == [
        name for name in names if name not in named
    ]


def test_a_run_that_finds_nothing_changes_nothing_and_says_so():
    made = case("mlp")
    with unchanged(made.model):
        config = NIOConfig(**COMPUTED, loss_bound=1e-9)
        result = initialize(made.model, batches_of("mlp", 5), made.loss_fn, config)
    assert result.status == "unchanged"
    assert result.message.startswith("No scale was changed: no larger weights are needed, or none keep the bounds. ")
    assert result.after == result.before


def test_models_that_are_initialised_are_known_to_be():
    made = case("mlp")
    with pytest.raises(ConfigError):
        run("mlp", made, sub_batches=9)
    assert made.model not in INITIALISED
    run("mlp", made)
    assert made.model in INITIALISED
    assert case("mlp").model not in INITIALISED


def _numbered(count):
    """Batches of 8 vectors, labels, and the numbers of the samples."""
    return [(*batch, torch.arange(8 * index, 8 * index + 8)) for index, batch in enumerate(batches_of("mlp", count))]


def _samples_seen(data, *, report=None, **settings):
    """Samples of each iteration as its first pass meets them, and those that the other measurements meet."""
    made = case("mlp")
    log, starts, ends = [], [], []

    def recorded(model, batch):
        log.append(batch[2].tolist())
        return made.loss_fn(model, batch[:2])

    watch = {
        "on_trial": lambda told: starts.append(len(log)),
        "on_iteration": lambda record: ends.append(len(log)),
    }
    initialize(made.model, data, recorded, NIOConfig(**{**SHORT, **settings}), report=report, **watch)
    # Pass 1 computes both sub-batches, before it in the first iteration a look at the first one.
    passes = [log[start:end][-2:] for start, end in zip(starts, ends, strict=True)]
    others = log[: starts[0]] + log[ends[-1] :]
    return [calls[0] + calls[1] for calls in passes], {sample for call in others for sample in call}


class HostReads(TorchDispatchMode):
    """Counts the scalars that the host asks for one by one."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("curvature", ["exact", "finite_difference"])
def test_the_host_reads_a_few_numbers_an_iteration_and_no_more(curvature, monkeypatch):
    """The measurement, in one; then the moments and the direction of Adam, which are on the host already."""
    marks, lists = [], []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(tensor.numel()) or tolist(tensor))
    made, config = case("vit"), NIOConfig(**{**SHORT, "iterations": 5, "curvature": curvature})
    task = (made.model, batches_of("vit", 7), made.loss_fn, config)
    with HostReads() as reads:
        initialize(*task, on_iteration=lambda record: marks.append(len(lists) + reads.count))
    assert np.diff(marks).tolist() == [4] * 4
