"""A search from its start to its end: what it costs, and how it stops and goes on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nio_hf import NIOConfig, NIOResult, initialize
from nio_hf.core import NIO, NIOState, Resumption, expected_cost, search
from nio_hf.core.method import Method
from nio_hf.errors import CheckpointError, ConfigError, DataError, StoppedError
from tests.core.cases import batches_of, case, differences, scaling_problem, state

SEARCHES: dict[str, dict[str, Any]] = {
    "scan": {"groups": "kind", "budget": 20.0},
    "scan of one group": {"groups": "model"},
    "gradient": {"search": "gradient", "groups": "kind", "iterations": 6},
    "published": {"search": "published", "groups": "tensor", "scaled_tensors": "all", "iterations": 5, "lr": 0.05},
}


def config_of(name: str, **changes: Any) -> NIOConfig:
    return NIOConfig(**{"sub_batches": 2, "search_batches": 2, "report_batches": 2, **SEARCHES[name], **changes})


def run(name: str, resumption: Resumption | None = None, batches: Any = None, **changes: Any) -> NIOResult:
    made = case("mlp")
    given = batches_of("mlp", 6) if batches is None else batches
    return initialize(made.model, given, made.loss_fn, config_of(name, **changes), resumption=resumption)


def through_json(saved: NIOState) -> NIOState:
    return NIOState.from_dict(json.loads(json.dumps(saved.to_dict(), sort_keys=True)))


def same(one: NIOResult, other: NIOResult) -> bool:
    """Whether two results differ in their times alone."""
    fields = [{**result.to_dict(), "seconds": 0, "peak_memory": 0} for result in (one, other)]
    for field in fields:
        field["history"] = [{**record, "seconds": 0} for record in field["history"]]
    return json.dumps(fields[0]) == json.dumps(fields[1])


@pytest.mark.parametrize("name", SEARCHES)
def test_a_run_that_is_stopped_after_any_iteration_ends_as_if_it_had_not_been(name: str) -> None:
    whole = run(name)
    assert len(whole.history) > 1
    for stop_after in range(len(whole.history)):
        asked: list[int] = []
        saved: list[NIOState] = []
        made = case("mlp")
        before = state(made.model)

        def should_stop(stop_after: int = stop_after, asked: list[int] = asked) -> bool:
            asked.append(1)
            return len(asked) > stop_after

        resumption = Resumption(save=saved.append, every=None, should_stop=should_stop)
        with pytest.raises(StoppedError, match=f"stopped after {stop_after} iterations, which are saved"):
            initialize(made.model, batches_of("mlp", 6), made.loss_fn, config_of(name), resumption=resumption)
        assert not differences(before, state(made.model))
        assert [each.iterations for each in saved] == [stop_after] * bool(stop_after)
        again = run(name, Resumption(state=through_json(saved[0])) if saved else None)
        assert same(again, whole)


@pytest.mark.parametrize(
    ("every", "iterations"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (9, [5]), (None, [])]
)
def test_a_run_is_saved_every_so_often_and_at_its_end(every: int | None, iterations: list[int]) -> None:
    saved: list[NIOState] = []
    whole = run("published", Resumption(save=saved.append, every=every))
    assert [each.iterations for each in saved] == iterations
    for each in saved:
        assert same(run("published", Resumption(state=through_json(each))), whole)
        assert each.before == whole.before


@pytest.mark.parametrize("name", SEARCHES)
def test_a_run_that_has_ended_ends_there_again_with_its_times_added_up(name: str) -> None:
    saved: list[NIOState] = []
    whole = run(name, Resumption(save=saved.append, every=100))
    calls: list[None] = []
    last = saved[-1]
    again = run(name, Resumption(state=last, save=lambda state: calls.append(None)))
    assert same(again, whole)
    assert not calls
    assert again.history == whole.history
    assert again.seconds > last.seconds > sum(record.seconds for record in whole.history)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gradient", {}, "is of the search 'published', not 'gradient'"),
        ("published", {"groups": "kind"}, r"7 scales for \d groups of tensors"),
        ("published", {"scaled_tensors": "weights"}, "7 scales for 3 groups of tensors"),
    ],
)
def test_a_state_of_another_run_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    saved: list[NIOState] = []
    run("published", Resumption(save=saved.append))
    with pytest.raises(CheckpointError, match=rf"resumption\.state: .*{message}"):
        run(name, Resumption(state=saved[-1]), **changes)


@pytest.mark.parametrize("name", SEARCHES)
def test_what_is_tried_is_told_before_and_what_came_of_it_after(name: str) -> None:
    made, told, seen = case("mlp"), [], []
    result = initialize(
        made.model,
        batches_of("mlp", 7),
        made.loss_fn,
        config_of(name),
        on_trial=told.append,
        on_iteration=lambda record: seen.append((len(told), record)),
    )
    assert told == [record.tried for record in result.history]
    assert [record for _, record in seen] == list(result.history)
    assert [count for count, _ in seen] == [record.iteration for record in result.history]
    assert [record.iteration for record in result.history] == list(range(1, len(result.history) + 1))


@pytest.mark.parametrize("name", SEARCHES)
def test_no_run_costs_more_than_was_expected(name: str) -> None:
    result = run(name)
    assert result.cost == pytest.approx(sum(record.cost for record in result.history) + 4)
    assert result.cost <= expected_cost(config_of(name), len(result.groups))
    # Reports on other batches than the first ones cost what these do.
    assert expected_cost(config_of(name), 3, batches=5) == expected_cost(config_of(name), 3) + 6


def test_groups_say_what_became_of_them() -> None:
    result = run("scan", budget=80.0, loss_bound=None, norm_band=None, scaled_tensors="all")
    trials = [record for record in result.history if record.group is not None]
    largest = max(result.groups, key=lambda group: group.parameters)
    assert {group.name for group in result.groups} - {largest.name} == {record.group for record in trials}
    (common,) = [r.scale for r in result.history if r.group is None and r.outcome == "accepted"]
    for group in result.groups:
        is_largest = group is largest
        own = [r for r in result.history[1:] if r.group == (None if is_largest else group.name)]
        assert (group.tried, group.ended) == (len(own), own[-1].outcome if own else None)
        accepted = [record for record in own if record.outcome == "accepted"]
        assert group.omega == pytest.approx(accepted[-1].scale if accepted else common)
        assert (group.gain > 0) == (bool(accepted) and not is_largest)
    assert any(group.gain > 0 for group in result.groups)
    untried = run("scan", budget=1.0)
    common = next(group for group in untried.groups if group.name == largest.name)
    assert (common.tried, common.ended) == (1, "accepted")
    assert [(group.tried, group.ended) for group in untried.groups if group != common] == [(0, None)] * 2
    assert [(group.tried, group.gain) for group in run("gradient").groups] == [(0, None)] * 3


@pytest.mark.parametrize("objective", ["gc", "gc_norm"])
@pytest.mark.parametrize("name", SEARCHES)
def test_records_say_what_was_measured(name: str, objective: Any) -> None:
    result = run(name, objective=objective)
    for record in result.history:
        assert (record.grad_cosine is None) == (record.grad_norm is None)
        # An objective of its own is told where it is not GC; the paper's search reads none.
        own = objective != "gc" and result.config.search != "published" and record.grad_norm is not None
        assert (record.objective is not None) == own
        if own:
            assert record.objective > record.grad_cosine


# Data.


@pytest.mark.parametrize("name", ["scan", "gradient"])
def test_searches_on_fixed_batches_need_two_of_them(name: str) -> None:
    with pytest.raises(DataError, match=r"1 batches beside those of the report.* lower NIOConfig\.report_batches"):
        run(name, batches=batches_of("mlp", 3))
    assert run(name, batches=batches_of("mlp", 4)).history
    # A re-iterable is not gone through again: a batch that comes twice would make the noise look smaller.
    whole = run(name, batches=batches_of("mlp", 5), search_batches=9)
    assert same(whole, run(name, batches=iter(batches_of("mlp", 5)), search_batches=9))


def test_fixed_batches_are_the_same_in_each_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("scan")
    made = case("mlp")
    with scaling_problem(made.model, made.loss_fn, config, batches_of("mlp", 3)) as problem:
        data = search.SEARCHES["scan"].data(problem, 0)
        assert len(next(data)) == 2
        assert next(data) is next(data)


def test_the_method_of_nio_takes_what_its_search_needs() -> None:
    assert isinstance(NIO, Method)
    assert NIO.batches(config_of("scan", search_batches=7), {}) == 7
    assert NIO.batches(config_of("published", iterations=11), {}) == 11
    with pytest.raises(ConfigError, match=r"nio\.rate: is no option of nio\. Leave it out: it has none of its own"):
        NIO.checked({"rate": 3})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"groups": "model"}, "scales of the weights, one scalar (omega) for all of them"),
        ({"groups": "kind"}, "one scalar (omega) per kind of tensors"),
        ({"groups": "tensor", "norm_band": None}, "one scalar (omega) per tensor"),
        ({"groups": {"a": "b"}}, "one scalar (omega) per group of tensors"),
        ({}, " under bounds on loss and gradient norm."),
        ({}, "one scalar (omega) for additive tensors and one for all others, so that layers keep the variance"),
        ({"groups": "kind", "norm_band": None, "loss_bound": None}, "agree (GradCosine)."),
        ({"objective": "variance"}, "sub-batches vary little under"),
        ({"norm_band": None}, " under a bound on loss."),
        ({"search": "published"}, "agree (GradCosine)."),
        ({"search": "published", "gamma": 1.0}, " under a bound on gradient norm."),
    ],
)
def test_the_description_follows_the_settings(settings: dict[str, Any], words: str) -> None:
    assert words in NIO.describe(NIOConfig(**settings))
