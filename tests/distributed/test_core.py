"""NIO in several processes: the same scales, the work shared, and an error of one that stops all."""

import itertools
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nio_hf import NIOConfig, initialize
from nio_hf.core import Collective, curvature
from nio_hf.core.collective import SIGNALS
from nio_hf.errors import (
    ConfigError,
    DataError,
    ModelError,
    NIOMemoryError,
    NumericsError,
    Problem,
    RankError,
    StoppedError,
)
from tests.core.cases import batches_of, case, differences, state
from tests.distributed.ranks import run_ranks

SAMPLES = 12
ITERATIONS = 4
REPORT_BATCHES = 2
PUBLISHED = {
    "search": "published",
    "groups": "tensor",
    "scaled_tensors": "all",
    "objective": "gc",
    "iterations": ITERATIONS,
    "lr": 0.05,
    "curvature": "exact",
}
BOUNDED = {"groups": "model", "loss_bound": 0.02, "least_norm": None}
"""Settings that a rise of the loss bounds."""
REFUSED = {"least_norm": 1.0, "loss_bound": None}
"""Settings of which the ViT has one candidate after the other refused."""
EXCHANGE = SIGNALS
"""Numbers in which the processes tell each other how it goes: at the start of an iteration and after each pass."""


def _computed(sub_batches=4, **settings):
    return NIOConfig(**{"sub_batches": sub_batches, "report_batches": REPORT_BATCHES, **settings})


def _published(sub_batches=4, **settings):
    return _computed(sub_batches, **{**PUBLISHED, **settings})


def _initialise(name, config, loss_fn=None, made=None, batches=None, **options):
    """NIO on all processes; the model is left as it was where they raise an error."""
    made = made or case(name, SAMPLES)
    batches = batches_of(name, 6, SAMPLES) if batches is None else batches
    before = state(made.model)
    options = {"collective": Collective.current(), **options}
    try:
        return initialize(made.model, batches, loss_fn or made.loss_fn, config, **options)
    except Exception:
        assert not differences(before, state(made.model))
        raise


def _found(name, config, loss_fn=None):
    """Scales; what was tried and became of it; what was measured; the message."""
    result = _initialise(name, config, loss_fn)
    decisions = [(record.tried, record.outcome, record.scale) for record in result.history]
    values = (value for record in result.history for value in (record.grad_cosine, record.grad_norm, record.loss))
    measured = [value for value in values if value is not None]
    measured += [*(part.value for part in (*result.before.parts, *result.after.parts)), result.gain]
    return result.scales, decisions, measured, result.message


@pytest.mark.parametrize(
    ("name", "sub_batches", "sizes", "settings"),
    [
        ("vit", 4, (2, 3, 4), {}),
        ("vit", 3, (2,), {"strength": 0.5, "micro_batch_size": 2}),
        ("vit", 4, (3,), {"groups": "model", "loss_bound": 0.02}),
        ("vit", 3, (2,), BOUNDED),
        ("swin", 3, (2,), BOUNDED),
        ("bert", 3, (2,), BOUNDED),
        ("mlp", 5, (2, 3, 4), {}),
        ("swin", 4, (3,), {"micro_batch_size": 2}),
        ("bert", 2, (3, 4), {}),
        ("vit", 4, (2, 3, 4), PUBLISHED),
        ("vit", 3, (2,), {**PUBLISHED, "overlap": 0.3}),
        ("vit", 2, (3, 4), PUBLISHED),
        ("swin", 4, (3,), {**PUBLISHED, "curvature": "auto", "micro_batch_size": 2}),
        ("mlp", 5, (2, 3, 4), {**PUBLISHED, "objective": "gc_sum_norm"}),
        ("mlp", 4, (2, 3, 4), {**PUBLISHED, "gamma": 0.01}),
        ("resnet", 3, (2,), PUBLISHED),
        ("bert", 4, (2,), PUBLISHED),
    ],
)
def test_any_number_of_processes_finds_the_same_scales(name, sub_batches, sizes, settings):
    """D = 3 and 5 are shared unequally; with D = 2, a third and a fourth process only take part in the sums.

    Sums in another order round differently, by some units of 6e-8, which steps of Adam carry on.
    """
    config = _computed(sub_batches, **settings)
    alone, decisions, measured, message = _found(name, config)
    assert max(abs(omega - 1) for omega in alone.values()) > 0.02
    assert settings is not BOUNDED or "loss_bound" in [outcome for _, outcome, _ in decisions]
    for size in sizes:
        found = run_ranks(size, _found, name, config)
        assert all(of_rank == found[0] for of_rank in found)
        assert found[0][0] == pytest.approx(alone, rel=3e-5)
        assert found[0][1] == decisions
        assert found[0][2] == pytest.approx(measured, rel=1e-3, abs=1e-4)
        assert settings is not BOUNDED or found[0][3].split(". ")[0] == message.split(". ")[0]


def _initialise_synchronised():
    made = case("resnet", SAMPLES)
    nn.SyncBatchNorm.convert_sync_batchnorm(made.model)
    _initialise("resnet", None, made=made)


def test_batch_normalisation_that_waits_for_other_processes_is_refused():
    for error in run_ranks(2, _initialise_synchronised):
        assert isinstance(error, ModelError)
        assert "SyncBatchNorm" in str(error)


class _OverflowingOnOneRank:
    """A loss that is no number on rank 1 where the weights are more than 1.5 times as large as they were."""

    def __init__(self, loss_fn, model):
        self.loss_fn, self.limit = loss_fn, 1.5 * float(next(model.parameters()).detach().norm())

    def __call__(self, model, batch):
        large = float(next(model.parameters()).detach().norm()) > self.limit
        loss = self.loss_fn(model, batch)
        return loss * float("nan") if large and Collective.current().rank == 1 else loss


def _overflowing(config):
    made = case("vit", SAMPLES)
    return _found("vit", config, _OverflowingOnOneRank(made.loss_fn, made.model))[:2]


@pytest.mark.parametrize("settings", [{"groups": "model"}, {"loss_bound": None}])
def test_a_loss_that_is_no_number_on_one_process_bounds_all(settings):
    found = run_ranks(2, _overflowing, _computed(**settings))
    assert found[0] == found[1]
    scales, decisions = found[0]
    assert "loss_bound" in [outcome for _, outcome, _ in decisions]
    assert next(iter(scales.values())) <= 1.5
    assert _overflowing(_computed(**settings))[1] != decisions, "alone there is no rank 1"


class _Counting:
    """A loss that writes down which samples it has been computed on, by the first number of each."""

    def __init__(self, loss_fn):
        self.loss_fn = loss_fn
        self.calls = []

    def __call__(self, model, batch):
        self.calls.append(frozenset(batch[0][:, 0].tolist()))
        return self.loss_fn(model, batch)


def _forward_passes(config):
    """The calls of the loss, and how many iterations there were."""
    counting = _Counting(case("mlp").loss_fn)
    result = _initialise("mlp", config, counting)
    return counting.calls, len(result.history)


@pytest.mark.parametrize(("sub_batches", "size"), [(4, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("settings", [_computed, _published])
def test_no_process_computes_the_sub_batch_of_another(settings, sub_batches, size):
    config = settings(sub_batches)
    alone, _ = _forward_passes(config)
    found = run_ranks(size, _forward_passes, config)
    calls = [calls for calls, _ in found]
    assert set().union(*calls) == set(alone)
    for rank, (own, iterations) in enumerate(found):
        others = set().union(*(calls[other] for other in range(size) if other != rank))
        assert not set(own) & others
        shares = len(range(rank, sub_batches, size))
        # The report batches before and after, and on rank 0 the first look at the tensors.
        expected = 2 * shares * REPORT_BATCHES + (rank == 0)
        if config.search == "balance":
            assert iterations == 1, "the report after is the measurement of the scales"
        elif shares:
            # Three looks at the first sub-batch: for second derivatives, and for the size of their graphs.
            expected += shares * iterations + 3
        assert len(own) == expected


def _bytes_summed(name, config):
    """Bytes of each all-reduce of each iteration but the first, and the number of scaled tensors."""
    sent, marks = [], []
    original = dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        sent.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        result = _initialise(name, config, on_iteration=lambda record: marks.append(len(sent)))
    finally:
        dist.all_reduce = original
    assert len(marks) == len(result.history)
    return [sent[start:end] for start, end in itertools.pairwise(marks)], len(result.tensors)


def _bytes_of_gradients(name, sub_batches):
    """Bytes of a gradient, and of all that is summed with it."""
    numbers = sum(parameter.numel() for parameter in case(name).model.parameters() if parameter.any())
    return 4 * numbers, 4 * (numbers + 2 * sub_batches)


@pytest.mark.parametrize("sub_batches", [2, 4, 6])
@pytest.mark.parametrize("objective", ["gc", "gc_sum_norm"])
def test_a_published_iteration_sums_the_gradients_once_and_the_scales_once(sub_batches, objective):
    gradients, with_norms = _bytes_of_gradients("mlp", sub_batches)
    for sent, scaled in run_ranks(2, _bytes_summed, "mlp", _published(sub_batches, objective=objective)):
        assert len(sent) == ITERATIONS - 1
        for iteration in sent:
            assert sum(iteration) == with_norms + 4 * (scaled + 3 * EXCHANGE)
            assert [size for size in iteration if size >= gradients] == [gradients]


@pytest.mark.parametrize("sub_batches", [3, 4, 6])
def test_a_candidate_sums_the_gradients_of_each_report_batch_once(sub_batches):
    _, with_norms = _bytes_of_gradients("vit", sub_batches)
    for sent, _ in run_ranks(2, _bytes_summed, "vit", _computed(sub_batches, **REFUSED)):
        assert len(sent) > 1
        for iteration in sent:
            assert sum(iteration) == 4 * EXCHANGE + REPORT_BATCHES * (with_norms + 4 * EXCHANGE)


class _MyDataError(DataError):
    """An error that only its user knows."""


class _FailingLoss:
    """A loss that fails on one rank, at its n-th call."""

    def __init__(self, loss_fn, failure, rank, call):
        self.loss_fn, self.failure, self.rank, self.call = loss_fn, failure, rank, call
        self.calls = 0

    def __call__(self, model, batch):
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


def _fail(name, failure, rank, call, config):
    # Nothing is kept, so that the second pass computes losses.
    curvature.MEMORY_SHARE = 0.0
    _initialise(name, config, _FailingLoss(case(name).loss_fn, failure, rank, call))


FAILURES = {
    "nan": (NumericsError, ("the loss is nan", "the scale gradient of 0.weight is not finite")),
    "nan gradient": (NumericsError, ("gradient of 0.weight is not finite",)),
    "memory": (NIOMemoryError, ("out of memory",)),
    "data": (DataError, ("image 7: broken",)),
    "other": (RankError, ("KeyError: 'pixels'",)),
    "mine": (DataError, ("my set: is of mine",)),
}
# The calls lie in the measurement before, in both passes of an iteration, and in the choice of the path.
PUBLISHED_CALLS = [("mlp", 1, 1), ("mlp", 2, 9), ("mlp", 0, 10), ("mlp", 1, 6), ("mlp", 1, 4)]
# They lie in the measurement before, in that of the scales, and in a forward pass that balances them.
COMPUTED_CALLS = [("mlp", 1, 2), ("mlp", 2, 3), ("mlp", 0, 8), ("vit", 1, 4)]


@pytest.mark.parametrize(
    ("failure", "config", "name", "rank", "call"),
    [
        *((failure, _published(), *place) for failure in FAILURES for place in PUBLISHED_CALLS),
        *((failure, _computed(), *place) for failure in [*FAILURES][2:] for place in COMPUTED_CALLS),
    ],
)
def test_an_error_of_one_process_stops_all_at_once(failure, config, name, rank, call):
    error_type, texts = FAILURES[failure]
    started = time.monotonic()
    errors = run_ranks(3, _fail, name, failure, rank, call, config, seconds=20)
    assert time.monotonic() - started < 20
    assert {type(error) for error in errors} == {error_type}
    assert len({str(error) for error in errors}) == 1
    assert f"rank {rank}" in str(errors[0])
    assert any(text in str(errors[0]) for text in texts)


def _bad_batches(number, config):
    def batches():
        for index, batch in enumerate(batches_of("mlp", 8)):
            if index == number and Collective.current().rank == 1:
                raise OSError("disk unplugged")
            yield batch

    _initialise("mlp", config, batches=batches())


def _bad_callback(number, config):
    def on_iteration(record):
        if Collective.current().rank == 1 and record.iteration == number:
            raise ValueError("the bar is broken")

    _initialise("mlp", config, on_iteration=on_iteration)


@pytest.mark.parametrize(
    ("fail", "number", "config", "found"),
    [
        *((_bad_batches, number, _published(), "OSError: disk unplugged") for number in (0, 1, 2, 4)),
        (_bad_batches, 1, _computed(), "OSError: disk unplugged"),
        (_bad_callback, 1, _published(), "ValueError: the bar is broken"),
        (_bad_callback, 1, _computed(), "ValueError: the bar is broken"),
    ],
)
def test_an_exception_in_the_data_or_a_callback_of_one_process_stops_all(fail, number, config, found):
    errors = run_ranks(2, fail, number, config, seconds=20)
    assert [type(error) for error in errors] == [RankError, RankError]
    assert len({str(error).splitlines()[0] for error in errors}) == 1
    assert str(errors[0]).startswith(f"rank 1: {found}")


def test_an_error_that_all_have_in_common_is_raised_as_it_is():
    errors = run_ranks(2, _initialise, "mlp", _published(sub_batches=SAMPLES + 1))
    assert [type(error) for error in errors] == [ConfigError, ConfigError]
    assert "rank" not in str(errors[0])


def _unlike(what):
    """NIO on two processes, of which one has something else."""
    is_other = Collective.current().rank == 1
    name = "vit" if what == "model" and is_other else "mlp"
    made = case(name)
    if what == "weights" and is_other:
        with torch.no_grad():
            made.model[0].bias += 1e-3
    config = _published(lr=0.1 if what == "settings" and is_other else 0.05)
    batches = batches_of(name, 7, 10 if what == "sizes" and is_other else 8)
    _initialise(name, config, made=made, batches=batches[what == "report batches" and is_other :])


@pytest.mark.parametrize(
    ("what", "found", "fix"),
    [
        ("model", "the model class and settings of NIO", "the same model class, settings and data"),
        ("settings", "the model class and settings of NIO", "the same model class, settings and data"),
        ("weights", "the weights", "Build the model from the same seed on all processes, and call initialize before"),
        ("sizes", "the report batches", "neither accelerate.prepare nor a distributed sampler has split"),
        ("report batches", "the report batches", "neither accelerate.prepare nor a distributed sampler has split"),
    ],
)
def test_processes_with_another_task_are_refused_by_what_differs(what, found, fix):
    for error in run_ranks(2, _unlike, what, seconds=20):
        assert isinstance(error, NumericsError)
        (problem,) = error.problems
        assert (problem.where, problem.found) == (found, "not the same on rank 0 and rank 1")
        assert fix in problem.fix


def _broken_data():
    batches = batches_of("mlp", 6)
    batches[0][0][:] = float("nan")
    _initialise("mlp", _computed(), batches=batches)


def test_broken_data_of_all_processes_are_not_taken_for_other_data():
    errors = run_ranks(2, _broken_data, seconds=20)
    assert {str(error) for error in errors} == {
        "rank 0, report batch 0, sub-batch 0: the loss is nan. Check inputs, labels and the initial weights."
    }


def _by_itself():
    if Collective.current().rank == 1:
        return {}
    return _initialise("mlp", _published(), collective=Collective()).scales


def test_a_process_may_work_by_itself_where_that_is_said():
    assert run_ranks(2, _by_itself, seconds=20) == [_initialise("mlp", _published()).scales, {}]


def _data_that_end():
    count = 4 if Collective.current().rank == 1 else 6
    result = _initialise("mlp", _published(), batches=iter(batches_of("mlp", count)))
    return result.status, len(result.history)


def test_where_the_data_of_one_process_end_all_end():
    assert run_ranks(2, _data_that_end, seconds=20) == [("data_exhausted", 2)] * 2


def _stopped_after(count, config):
    """The iterations of a run that only the last rank asks to stop."""
    seen, collective = [], Collective.current()

    def should_stop():
        return len(seen) == count and collective.rank == collective.size - 1

    with pytest.raises(StoppedError, match="stopped before it was through"):
        _initialise("vit", config, on_iteration=seen.append, should_stop=should_stop)
    return len(seen)


@pytest.mark.parametrize(
    ("count", "config"),
    [(0, _published()), (3, _published()), (0, _computed()), (2, _computed(**REFUSED))],
    ids=["published", "published, fourth", "computed", "computed, third"],
)
def test_where_one_process_is_asked_to_stop_all_stop(count, config):
    assert run_ranks(2, _stopped_after, count, config) == [count, count]
