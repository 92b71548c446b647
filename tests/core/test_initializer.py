"""The whole run on every family: what it changes, what it leaves alone, what it reports."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nio_hf import NIOConfig, NIOResult, grad_cosine, initialize
from nio_hf.core.result import Status
from tests import zoo
from tests.core.cases import FAMILIES, PER_TENSOR, Case, batches_of, case, differences, state

SHORT: dict[str, Any] = {
    **PER_TENSOR,
    "iterations": 3,
    "holdout_batches": 2,
    "sub_batches": 2,
    "lr": 0.05,
    "curvature": "exact",
}


def run(name: str, made: Case | None = None, batches: Any = None, **settings: Any) -> tuple[Case, NIOResult]:
    """A short run on a tiny model."""
    made = made or case(name)
    batches = batches_of(name, 5) if batches is None else batches
    return made, initialize(made.model, batches, made.loss_fn, NIOConfig(**{**SHORT, **settings}))


def generator_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()]


class Endless:
    """A re-iterable without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(batches_of("mlp", 5))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_scaled_in_place_and_otherwise_left_alone(name: str) -> None:
    made = case(name)
    next(iter(made.model.children())).eval()
    made.loss_fn(made.model, made.batch)
    first = next(made.model.parameters())
    first.grad = torch.ones_like(first)
    before, generators = state(made.model), generator_states()
    batches = batches_of(name, 5)
    _, result = run(name, made, batches)

    after = state(made.model)
    for parameter, omega in result.scales.items():
        key = f"{parameter}: value"
        assert torch.equal(after[key], before[key] * torch.tensor(omega)), parameter
    assert set(differences(before, after)) <= {f"{parameter}: value" for parameter in result.scales}
    assert generator_states() == generators
    assert max(abs(omega - 1) for omega in result.scales.values()) > 0.04

    assert result.status in get_args(Status)
    assert [record.iteration for record in result.history] == [1, 2, 3]
    assert result.gamma == 2 * result.before.grad_norm
    assert result.curvature == "exact"
    for index, part in enumerate(result.after.parts):
        again = grad_cosine(made.model, batches[index], made.loss_fn, sub_batches=2)
        assert (again.value, again.norms, again.loss) == (part.value, part.norms, part.loss)
    assert result.after.value == pytest.approx(sum(part.value for part in result.after.parts) / 2)
    assert f"{result.before.value:.4f} -> {result.after.value:.4f}" in result.message


@pytest.mark.parametrize("objective", ["gc", "gc_norm", "gc_sum_norm", "variance"])
@pytest.mark.parametrize("curvature", ["exact_kept", "finite_difference", "finite_difference_kept"])
def test_all_paths_learn_the_same_scales(curvature: str, objective: str) -> None:
    _, exact = run("vit", objective=objective)
    _, other = run("vit", objective=objective, curvature=curvature)
    assert other.curvature == curvature
    # Adam's steps are nearly signs, so only scales with a clear gradient can be compared.
    moved = [name for name, omega in exact.scales.items() if abs(omega - 1) > 0.05]
    close = [name for name in moved if abs(other.scales[name] - exact.scales[name]) < 2e-3]
    assert len(close) >= 0.9 * len(moved) > 5


@pytest.mark.parametrize("name", ["vit", "gpt2", "bert"])
def test_micro_batches_learn_the_same_scales(name: str) -> None:
    made = [case(name) for _ in range(2)]
    for each in made:
        each.model.double()
    whole, split = (run(name, m, micro_batch_size=size)[1] for m, size in zip(made, (None, 3), strict=True))
    assert split.scales == pytest.approx(whole.scales, abs=1e-5)
    assert split.after.value == pytest.approx(whole.after.value, abs=1e-5)


@pytest.mark.parametrize("name", ["vit", "swin", "gpt2"])
def test_activation_checkpointing_learns_the_same_scales(name: str) -> None:
    checkpointed = case(name)
    checkpointed.model.activation_checkpointing_enable()
    _, result = run(name, checkpointed)
    assert result.scales == pytest.approx(run(name)[1].scales, abs=1e-5)


def test_dropout_does_not_reach_the_scales() -> None:
    plain = case("vit", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert run("vit", plain)[1].scales == run("vit")[1].scales


def test_the_seed_decides_the_scales() -> None:
    first, second, other = (run("mlp", seed=seed)[1].scales for seed in (0, 0, 1))
    made = case("mlp")
    torch.manual_seed(7)
    assert run("mlp", made)[1].scales == first == second
    assert other != first


def test_a_loss_may_take_keys_out_of_its_batch() -> None:
    made = case("vit")

    def popping(model: nn.Module, batch: Any) -> Tensor:
        labels = batch.pop("labels")
        return zoo.image_loss(model, {**batch, "labels": labels})

    assert run("vit", Case(made.model, made.batch, popping))[1].scales == run("vit")[1].scales


def test_an_absolute_bound_replaces_the_relative_one() -> None:
    assert run("mlp", gamma=3.0)[1].gamma == 3.0
    _, result = run("mlp", gamma_relative=1.5)
    assert result.gamma == pytest.approx(1.5 * result.before.grad_norm)


def test_a_random_loss_is_the_same_function_each_time_a_sub_batch_is_computed() -> None:
    made, draws = case("mlp"), []

    def noisy(model: nn.Module, batch: Any) -> Tensor:
        noise = torch.randn_like(batch[0])
        draws.append(noise[0, 0].item())
        return made.loss_fn(model, (batch[0] + noise, batch[1]))

    run("mlp", Case(made.model, made.batch, noisy), holdout_batches=1)
    before, *iterations, after = draws[1:3], draws[3:7], draws[7:11], draws[11:15], draws[15:]
    assert before == after
    assert all(calls[:2] == calls[2:] for calls in iterations)
    assert len({*before, *(draw for calls in iterations for draw in calls)}) == 8


def test_held_out_batches_are_never_optimised_on_and_data_start_again() -> None:
    optimised, held_out = _samples_seen(_numbered(4), iterations=5, holdout_batches=2)
    assert held_out == set(range(16))
    assert [{sample // 8 for sample in batch} for batch in optimised] == [{2}, {3}, {2}, {3}, {2}]
    assert all(sorted(batch) == sorted(set(batch)) for batch in optimised)
    assert optimised[0] != optimised[2], "each iteration has its own order"


def test_a_re_iterable_without_a_length_learns_what_a_list_does() -> None:
    assert run("mlp", batches=Endless(), iterations=7)[1].scales == run("mlp", iterations=7)[1].scales


def test_given_held_out_batches_leave_all_data_to_optimise_on() -> None:
    data = _numbered(3)
    optimised, held_out = _samples_seen(data[:2], iterations=3, holdout=data[2:])
    assert held_out == set(range(16, 24))
    assert [{sample // 8 for sample in batch} for batch in optimised] == [{0}, {1}, {0}]


def test_overlap_shares_samples_between_neighbours() -> None:
    optimised, _ = _samples_seen(_numbered(2), iterations=1, holdout_batches=1, overlap=0.5)
    # Two sub-batches of 4 and the 2 samples that follow each.
    assert len(optimised[0]) == 12
    assert set(optimised[0]) == set(range(8, 16))


def test_an_iterator_that_ends_keeps_what_was_learned() -> None:
    _, result = run("mlp", batches=iter(batches_of("mlp", 4)), iterations=9)
    assert result.status == "data_exhausted"
    assert "The data ended after 2 of 9 iterations" in result.message
    assert len(result.history) == 2
    _, other = run("mlp", batches=iter(batches_of("mlp", 4)), iterations=2)
    assert result.scales == other.scales
    assert any(omega != 1 for omega in other.scales.values())


@pytest.mark.parametrize(("gamma", "gamma_relative"), [(0.01, None), (99.0, None), (None, 0.01), (None, 50.0)])
def test_above_gamma_the_norm_is_lowered(gamma: float | None, gamma_relative: float | None) -> None:
    _, result = run("mlp", gamma=gamma, gamma_relative=gamma_relative, iterations=10)
    before = result.before.grad_norm
    assert result.gamma == (gamma_relative * before if gamma is None else gamma)
    for record in result.history:
        assert record.branch == ("constraint" if record.grad_norm > result.gamma else "objective")
    if result.gamma < before:
        assert {record.branch for record in result.history} == {"constraint"}
        assert result.after.grad_norm < 0.8 * before
        assert result.status == "constraint_violated"
    else:
        assert {record.branch for record in result.history} == {"objective"}
        assert result.after.value > result.before.value


def test_scales_stay_within_their_bounds() -> None:
    _, result = run("mlp", iterations=12, lr=0.1, min_scale=0.8, max_scale=1.25, gamma_relative=None)
    omegas = torch.tensor(list(result.scales.values()))
    assert omegas.min() == pytest.approx(0.8)
    assert omegas.max() == pytest.approx(1.25)


@pytest.mark.parametrize(("min_scale", "falls"), [(None, False), (0.01, True)])
def test_one_scale_for_the_model_falls_only_where_it_may(min_scale: float | None, falls: bool) -> None:
    settings = {"scaled_tensors": "weights", "scale_sharing": "model", "objective": "variance", "gamma_relative": None}
    _, result = run("mlp", iterations=3, lr=0.1, min_scale=min_scale, **settings)
    (omega,) = set(result.scales.values())
    assert (omega < 1) == falls
    assert omega <= 1


def test_iterations_are_reported_as_they_happen() -> None:
    made, seen = case("mlp"), []
    config = NIOConfig(**SHORT)
    result = initialize(made.model, batches_of("mlp", 5), made.loss_fn, config, on_iteration=seen.append)
    assert tuple(seen) == result.history
    first = result.history[0]
    inputs = batches_of("mlp", 3)[2]
    made = case("mlp")
    made.model.eval()
    assert first.loss == pytest.approx(made.loss_fn(made.model, inputs).item(), rel=1e-5)


def _numbered(count: int) -> list[Any]:
    """Batches of 8 vectors, labels, and the numbers of the samples."""
    return [(*batch, torch.arange(8 * index, 8 * index + 8)) for index, batch in enumerate(batches_of("mlp", count))]


def _samples_seen(data: list[Any], *, holdout: Any = None, **settings: Any) -> tuple[list[list[int]], set[int]]:
    """Samples of each iteration as its first pass meets them, and those that the other measurements meet."""
    made = case("mlp")
    log: list[list[int]] = []
    marks: list[int] = []

    def recorded(model: nn.Module, batch: Any) -> Tensor:
        log.append(batch[2].tolist())
        return made.loss_fn(model, batch[:2])

    def mark(record: Any) -> None:
        marks.append(len(log))

    config = NIOConfig(**{**SHORT, **settings})
    initialize(made.model, data, recorded, config, holdout=holdout, on_iteration=mark)
    # Both passes compute both sub-batches.
    passes = [log[end - 4 : end] for end in marks]
    assert all(calls[:2] == calls[2:] for calls in passes)
    others = log[: marks[0] - 4] + log[marks[-1] :]
    return [calls[0] + calls[1] for calls in passes], {sample for call in others for sample in call}


class HostReads(TorchDispatchMode):
    """Counts the scalars that the host asks for one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("curvature", ["exact", "exact_kept", "finite_difference_kept"])
def test_the_host_reads_once_an_iteration(curvature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lists: list[int] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(tensor.numel()) or tolist(tensor))
    marks: list[tuple[int, int]] = []
    made = case("vit")
    config = NIOConfig(**{**SHORT, "curvature": curvature})
    with HostReads() as reads:

        def mark(record: Any) -> None:
            marks.append((len(lists), reads.count))

        initialize(made.model, batches_of("vit", 5), made.loss_fn, config, on_iteration=mark)
    steps = np.diff(np.array(marks), axis=0)
    assert steps.tolist() == [[1, 0]] * (SHORT["iterations"] - 1)
