"""NIO in several processes: the same scales, the work shared, and an error of one that stops all."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nio_hf import NIOConfig, initialize
from nio_hf.core import Collective, NIOState, Resumption
from nio_hf.core.collective import SIGNALS
from nio_hf.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NIOError,
    NIOMemoryError,
    NumericsError,
    Problem,
    RankError,
    StoppedError,
)
from tests.core.cases import PER_TENSOR, batches_of, case
from tests.distributed.ranks import run_ranks

SAMPLES = 12
ITERATIONS = 4
FLAGS = 3 * SIGNALS
"""Numbers in which the processes tell each other how it goes: at the start of an iteration and after each pass."""


def _config(sub_batches: int = 4, **settings: Any) -> NIOConfig:
    common = {**PER_TENSOR, "iterations": ITERATIONS, "holdout_batches": 2, "lr": 0.05, "curvature": "exact"}
    return NIOConfig(sub_batches=sub_batches, **{**common, **settings})


def _initialise(name: str, config: NIOConfig, loss_fn: Any = None, resumption: Resumption | None = None) -> Any:
    made = case(name, SAMPLES)
    collective = Collective.current()
    batches = batches_of(name, 6, SAMPLES)
    loss_fn = loss_fn or made.loss_fn
    return initialize(made.model, batches, loss_fn, config, collective=collective, resumption=resumption)


def _scales(name: str, config: NIOConfig) -> dict[str, float]:
    return _initialise(name, config).scales


@pytest.mark.parametrize(
    ("name", "sub_batches", "sizes", "settings"),
    [
        ("vit", 4, (2, 3, 4), {}),
        ("vit", 3, (2,), {"overlap": 0.3}),
        ("vit", 2, (3, 4), {"curvature": "exact_kept"}),
        ("swin", 4, (3,), {"curvature": "auto", "micro_batch_size": 2}),
        ("mlp", 5, (2, 3, 4), {"objective": "variance"}),
        ("mlp", 4, (2, 3, 4), {"gamma": 0.01, "gamma_relative": None}),
        ("resnet", 3, (2,), {"batch_norm": "frozen"}),
        ("bert", 4, (2,), {}),
    ],
)
def test_any_number_of_processes_finds_the_same_scales(
    name: str, sub_batches: int, sizes: tuple[int, ...], settings: dict[str, Any]
) -> None:
    """D = 3 and 5 are shared unequally; with D = 2, a third and a fourth process only take part in the sums."""
    config = _config(sub_batches, **settings)
    alone = _scales(name, config)
    assert max(abs(omega - 1) for omega in alone.values()) > 0.02
    for size in sizes:
        found = run_ranks(size, _scales, name, config)
        assert all(scales == found[0] for scales in found)
        assert found[0] == pytest.approx(alone, rel=1e-5)


def _ended_by_the_loss(name: str, batch_norm: str) -> tuple[dict[str, float], int, str]:
    """What the default settings learn where a small rise of the loss ends them."""
    config = NIOConfig(
        sub_batches=3, iterations=30, holdout_batches=2, max_loss_rise=0.05, gamma_relative=None, batch_norm=batch_norm
    )
    result = _initialise(name, config)
    return result.scales, len(result.history), result.message


@pytest.mark.parametrize(("name", "batch_norm"), [("vit", "batch"), ("mlp", "batch"), ("resnet", "frozen")])
def test_a_loss_that_rises_ends_all_processes_at_once(name: str, batch_norm: str) -> None:
    scales, iterations, message = _ended_by_the_loss(name, batch_norm)
    assert len(set(scales.values())) == 1
    assert 1 <= iterations < 30
    assert "the loss of a batch had risen by" in message
    found = run_ranks(2, _ended_by_the_loss, name, batch_norm)
    assert found[0] == found[1]
    assert found[0][0] == pytest.approx(scales, rel=1e-5)
    assert found[0][1] == iterations


class _Counting:
    """A loss that writes down which samples it has been computed on, by the first number of each."""

    def __init__(self, loss_fn: Any) -> None:
        self.loss_fn = loss_fn
        self.calls: list[frozenset[float]] = []

    def __call__(self, model: Any, batch: Any) -> Any:
        self.calls.append(frozenset(batch[0][:, 0].tolist()))
        return self.loss_fn(model, batch)


def _forward_passes(sub_batches: int) -> list[frozenset[float]]:
    counting = _Counting(case("mlp").loss_fn)
    _initialise("mlp", _config(sub_batches), counting)
    return counting.calls


@pytest.mark.parametrize(("sub_batches", "size"), [(4, 2), (3, 2), (2, 3)])
def test_no_process_computes_the_sub_batch_of_another(sub_batches: int, size: int) -> None:
    alone = set(_forward_passes(sub_batches))
    calls = run_ranks(size, _forward_passes, sub_batches)
    assert set().union(*calls) == alone
    for rank, own in enumerate(calls):
        others = set().union(*(calls[other] for other in range(size) if other != rank))
        assert not set(own) & others
        shares = len(range(rank, sub_batches, size))
        # Two held-out batches before and after, two passes per iteration, and on rank 0 the first look at the tensors.
        assert len(own) == shares * (2 * 2 + 2 * ITERATIONS) + (rank == 0)


def _bytes_summed(name: str, config: NIOConfig) -> tuple[list[int], int, int]:
    """Bytes of each all-reduce from the first iteration on to the last, and P and m of the model."""
    sent: list[int] = []
    original = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **kwargs)

    marks: list[int] = []
    made = case(name, SAMPLES)
    dist.all_reduce = all_reduce
    try:
        result = initialize(
            made.model,
            batches_of(name, 6, SAMPLES),
            made.loss_fn,
            config,
            collective=Collective.current(),
            on_iteration=lambda record: marks.append(len(sent)),
        )
    finally:
        dist.all_reduce = original
    return sent[marks[0] : marks[-1]], len(marks) - 1, len(result.tensors)


@pytest.mark.parametrize("sub_batches", [2, 4, 6])
@pytest.mark.parametrize("objective", ["gc", "variance"])
def test_an_iteration_sums_the_gradients_once_and_the_scales_once(sub_batches: int, objective: str) -> None:
    gradient_numbers = sum(parameter.numel() for parameter in case("mlp").model.parameters())
    config = _config(sub_batches, objective=objective)
    for sent, iterations, scaled in run_ranks(2, _bytes_summed, "mlp", config):
        vectors = gradient_numbers * (2 if objective == "variance" else 1)
        expected = 4 * (vectors + 2 * sub_batches + scaled + FLAGS)
        assert sum(sent) == iterations * expected
        large = [size for size in sent if size >= 4 * gradient_numbers]
        assert len(large) == iterations


class _MyDataError(DataError):
    """An error that only its user knows."""


class _FailingLoss:
    """A loss that fails on one rank, at its n-th call."""

    def __init__(self, loss_fn: Any, failure: str, rank: int, call: int) -> None:
        self.loss_fn, self.failure, self.rank, self.call = loss_fn, failure, rank, call
        self.calls = 0

    def __call__(self, model: Any, batch: Any) -> Any:
        self.calls += 1
        loss = self.loss_fn(model, batch)
        if Collective.current().rank != self.rank or self.calls < self.call:
            return loss
        match self.failure:
            case "nan":
                return loss * float("nan")
            case "nan gradient":
                return loss + (next(model.parameters()).flatten()[0] * 0).sqrt() * 0
            case "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            case "data":
                raise DataError("a worker's traceback\nnio_hf.errors.DataError: image 7: broken. Replace it.")
            case "mine":
                raise _MyDataError(Problem("my set", "is of mine", "Mend it"))
            case _:
                raise KeyError("pixels")


def _fail(failure: str, rank: int, call: int) -> None:
    loss = _FailingLoss(case("mlp").loss_fn, failure, rank, call)
    _initialise("mlp", _config(), loss)


@pytest.mark.parametrize(
    ("failure", "error_type", "text"),
    [
        ("nan", NumericsError, ("the loss is nan", "the scale gradient of 0.weight is not finite")),
        ("nan gradient", NumericsError, "gradient of 0.weight is not finite"),
        ("memory", NIOMemoryError, "out of memory"),
        ("data", DataError, "image 7: broken"),
        ("other", RankError, "KeyError: 'pixels'"),
        ("mine", DataError, "my set: is of mine"),
    ],
)
@pytest.mark.parametrize(("rank", "call"), [(1, 1), (2, 9), (0, 10), (1, 6)])
def test_an_error_of_one_process_stops_all_at_once(
    failure: str, error_type: type[NIOError], text: str | tuple[str, str], rank: int, call: int
) -> None:
    """The calls lie in the measurement before, and in the first and second pass of an iteration."""
    started = time.monotonic()
    errors = run_ranks(3, _fail, failure, rank, call, seconds=20)
    assert time.monotonic() - started < 20
    assert {type(error) for error in errors} == {error_type}
    assert len({str(error) for error in errors}) == 1
    assert f"rank {rank}" in str(errors[0])
    assert any(part in str(errors[0]) for part in ([text] if isinstance(text, str) else text))


def _bad_batches(rank: int, number: int) -> None:
    made = case("mlp")

    def batches() -> Any:
        for index, batch in enumerate(batches_of("mlp", 8)):
            if index == number and Collective.current().rank == rank:
                raise OSError("disk unplugged")
            yield batch

    initialize(made.model, batches(), made.loss_fn, _config(), collective=Collective.current())


@pytest.mark.parametrize("number", [0, 1, 2, 4])
def test_an_exception_in_the_data_of_one_process_stops_all(number: int) -> None:
    errors = run_ranks(2, _bad_batches, 1, number, seconds=20)
    assert [type(error) for error in errors] == [RankError, RankError]
    assert {str(error).splitlines()[0] for error in errors} == {str(errors[0]).splitlines()[0]}
    assert str(errors[0]).startswith("rank 1: OSError: disk unplugged")


def _interrupted_callback() -> None:
    def on_iteration(record: Any) -> None:
        if Collective.current().rank == 1 and record.iteration == 2:
            raise ValueError("the bar is broken")

    made = case("mlp")
    batches = batches_of("mlp", 6)
    initialize(made.model, batches, made.loss_fn, _config(), collective=Collective.current(), on_iteration=on_iteration)


def test_an_exception_in_a_callback_of_one_process_stops_all() -> None:
    errors = run_ranks(2, _interrupted_callback, seconds=20)
    assert [type(error) for error in errors] == [RankError, RankError]
    assert "rank 1: ValueError: the bar is broken" in str(errors[0])


def test_an_error_that_all_have_in_common_is_raised_as_it_is() -> None:
    errors = run_ranks(2, _scales, "mlp", _config(sub_batches=SAMPLES + 1))
    assert [type(error) for error in errors] == [ConfigError, ConfigError]
    assert "rank" not in str(errors[0])


def _unlike(what: str) -> None:
    rank = Collective.current().rank
    made = case("mlp")
    if what == "model" and rank == 1:
        made = case("vit")
    config = _config(lr=0.05 if what != "settings" or rank == 0 else 0.1)
    samples = 8 if what != "batches" or rank == 0 else 10
    batches = batches_of("vit" if what == "model" and rank == 1 else "mlp", 6, samples)
    initialize(made.model, batches, made.loss_fn, config, collective=Collective.current())


@pytest.mark.parametrize("what", ["model", "settings", "batches"])
def test_processes_with_another_task_are_refused(what: str) -> None:
    for error in run_ranks(2, _unlike, what, seconds=20):
        assert isinstance(error, NumericsError)
        assert "not the same on rank 0 and rank 1" in str(error)


def _data_that_end(rank: int) -> tuple[str, int]:
    made = case("mlp")
    count = 4 if Collective.current().rank == rank else 6
    batches = iter(batches_of("mlp", count))
    result = initialize(made.model, batches, made.loss_fn, _config(), collective=Collective.current())
    return result.status, len(result.history)


def test_where_the_data_of_one_process_end_all_end() -> None:
    assert run_ranks(2, _data_that_end, 1, seconds=20) == [("data_exhausted", 2)] * 2


def _state_after(count: int) -> dict[str, Any]:
    """The state at a stop that only the last rank was asked for."""
    states: list[NIOState] = []
    collective = Collective.current()
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > count and collective.rank == collective.size - 1

    with pytest.raises(StoppedError, match=f"stopped after {count} of {ITERATIONS} iterations"):
        _initialise("vit", _config(), resumption=Resumption(None, states.append, 100, should_stop))
    assert len(states) == (count > 0)
    return states[0].to_dict() if states else {}


def _scales_from(state: dict[str, Any]) -> dict[str, float]:
    return _initialise("vit", _config(), resumption=Resumption(NIOState.from_dict(state))).scales


@pytest.mark.parametrize("count", [1, 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_scales(count: int) -> None:
    uninterrupted = run_ranks(2, _scales, "vit", _config())
    states = run_ranks(2, _state_after, count)
    assert [state["omega"] for state in states] == [states[0]["omega"]] * 2
    assert run_ranks(2, _scales_from, states[0]) == uninterrupted


def test_a_stop_before_the_first_iteration_saves_nothing() -> None:
    assert run_ranks(2, _state_after, 0) == [{}, {}]


def test_a_state_of_another_model_is_refused() -> None:
    state = NIOState.from_dict(_state_after_alone())
    with pytest.raises(CheckpointError, match="scales for a model with"):
        _initialise("mlp", _config(), resumption=Resumption(state))


def _state_after_alone() -> dict[str, Any]:
    states: list[NIOState] = []
    _initialise("vit", _config(), resumption=Resumption(None, states.append))
    return states[-1].to_dict()
