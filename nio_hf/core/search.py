"""NIO as a method: one of its searches, from the start or from where another run stopped."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nio_hf.core import descent, published, scan
from nio_hf.core.batches import SAME_BATCHES, batch_size, content_of, only_class
from nio_hf.core.config import NIOConfig, SearchName
from nio_hf.core.descent import DescentState
from nio_hf.core.method import Learned, Method, Options, Watch
from nio_hf.core.problem import ScalingProblem, search_parts
from nio_hf.core.published import PublishedState
from nio_hf.core.records import restored
from nio_hf.core.result import GradCosine, GroupScale, IterationRecord
from nio_hf.core.scan import ScanState
from nio_hf.errors import DataError, Problem, StoppedError

SearchState = ScanState | DescentState | PublishedState


@dataclasses.dataclass(frozen=True)
class NIOState:
    """A run after some of its iterations, in numbers that JSON keeps exactly.

    Attributes:
        search: name of the search.
        progress: its state.
        before: GradCosine on the report batches at omega = 1.
        seconds: wall time so far.
    """

    search: SearchName
    progress: SearchState
    before: GradCosine
    seconds: float

    @property
    def iterations(self) -> int:
        """The iterations that it has behind it."""
        return len(self.progress.history)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> NIOState:
        """Inverse of `to_dict`, after a trip through JSON."""
        progress = restored(SEARCHES[fields["search"]].state, fields["progress"])
        return cls(**{**fields, "progress": progress, "before": restored(GradCosine, fields["before"])})


@dataclasses.dataclass(frozen=True)
class Search:
    """A search as functions of explicit values.

    Attributes:
        state: type of its state.
        init: (problem) -> state.
        step: (problem, data, state) -> state, one record longer.
        finished: (problem, state) -> whether there is nothing left to do.
        describe: (problem, state) -> what the next step tries, in words.
        data: (problem, steps behind) -> what each further step is given.
    """

    state: type[SearchState]
    init: Callable[[ScalingProblem], Any]
    step: Callable[[ScalingProblem, Any, Any], Any]
    finished: Callable[[ScalingProblem, Any], bool]
    describe: Callable[[ScalingProblem, Any], str]
    data: Callable[[ScalingProblem, int], Iterator[Any]]


def run_search(problem: ScalingProblem, options: Options, watch: Watch) -> Learned:
    """The search of the settings, as the own part of a [`Method`].

    Raises:
        StoppedError: where that was asked for, after the state is saved.
    """
    search, resumption = SEARCHES[problem.config.search], watch.resumption
    earlier = 0.0 if resumption.state is None else resumption.state.seconds
    state: SearchState = search.init(problem) if resumption.state is None else resumption.state.progress
    saved, data = len(state.history), search.data(problem, len(state.history))

    def save() -> None:
        seconds = earlier + time.perf_counter() - watch.started
        resumption.save(NIOState(problem.config.search, state, problem.before, seconds))

    exhausted = False
    while not search.finished(problem, state):
        started = time.perf_counter()
        given = next(data, None)
        exhausted, stopped = problem.collective.any(given is None, resumption.should_stop())
        if exhausted:
            break
        if stopped:
            if saved < len(state.history):
                save()
            found = f"stopped after {len(state.history)} iterations, which are saved"
            raise StoppedError(Problem("NIO", found, "Start again to go on from there"))
        if watch.on_trial is not None:
            watch.on_trial(search.describe(problem, state))
        state = _timed(search.step(problem, given, state), time.perf_counter() - started)
        if watch.on_iteration is not None:
            watch.on_iteration(state.history[-1])
        if resumption.every is not None and len(state.history) % resumption.every == 0:
            save()
            saved = len(state.history)
    if resumption.every is not None and saved < len(state.history):
        save()
    problem.place(state.scales)
    return Learned(
        omega=problem.tensors.by_tensor(state.scales),
        groups=_groups(problem, state),
        history=state.history,
        cost=math.fsum(record.cost for record in state.history),
        data_exhausted=exhausted,
        seconds=earlier,
        micro_batch_size=state.micro_batch_size,
    )


def most_cost(config: NIOConfig, groups: int, options: Options | None = None) -> float:
    """Training steps that a search may take, reports not counted."""
    match config.search:
        case "scan":
            return scan.most_cost(config, groups)
        case "gradient":
            return descent.most_cost(config)
        case "published":
            return published.most_cost(config)


def _fixed_batches(problem: ScalingProblem, behind: int) -> Iterator[Any]:
    """The search batches, the same ones for every step.

    Raises:
        DataError: where there are fewer than two, or one holds samples of a single class.
        NumericsError: where processes have others.
    """
    batches = problem.stream.next_of_this_pass(problem.config.search_batches)
    if len(batches) < 2:
        found = f"{len(batches)} batches beside those of the report"
        fix = "Give more data, smaller batches, or lower NIOConfig.report_batches"
        raise DataError(Problem("batches", found, fix))
    for number, batch in enumerate(batches):
        label = only_class(batch)
        if label is not None:
            found = f"all {batch_size(batch)} samples have label {label}"
            fix = "Shuffle the data, or give larger batches: NIO compares the gradients of samples that differ"
            raise DataError(Problem(f"search batch {number}", found, fix))
    if problem.collective.size > 1:
        contents = [content_of(batch) for batch in batches]
        problem.collective.check_equal("the search batches", contents, SAME_BATCHES)
    parts = search_parts(problem, batches)
    while True:
        yield parts


def _new_batches(problem: ScalingProblem, behind: int) -> Iterator[Any]:
    """A new batch for every step, until the data end."""
    for _ in range(behind):
        problem.stream.next()
    while (batch := problem.stream.next()) is not None:
        yield batch


SEARCHES: Mapping[str, Search] = {
    "scan": Search(ScanState, scan.init, scan.step, scan.finished, scan.describe, _fixed_batches),
    "gradient": Search(DescentState, descent.init, descent.step, descent.finished, descent.describe, _fixed_batches),
    "published": Search(
        PublishedState, published.init, published.step, published.finished, published.describe, _new_batches
    ),
}
"""{name of a search: its functions}."""


def _timed(state: SearchState, seconds: float) -> SearchState:
    """The state with the wall time of its last record."""
    record = dataclasses.replace(state.history[-1], seconds=seconds)
    return dataclasses.replace(state, history=(*state.history[:-1], record))


def _groups(problem: ScalingProblem, state: SearchState) -> tuple[GroupScale, ...]:
    """The groups with what became of them."""
    trials: dict[str, list[IterationRecord]] = collections.defaultdict(list)
    # The trials of the common factor are those of the groups that keep it.
    free = state.free if isinstance(state, ScanState) else range(len(problem.tensors.groups))
    keeping = [name for position, name in enumerate(problem.tensors.groups) if position not in free]
    for record in state.history:
        if record.scale is not None:
            for name in keeping if record.group is None else [record.group]:
                trials[name].append(record)
    gains: dict[str, float] = {}
    if isinstance(state, ScanState) and problem.config.judged_by != "balance":
        gains = dict(zip(problem.tensors.groups, state.gains, strict=True))
    rows = zip(problem.tensors.groups.items(), state.scales, strict=True)
    return tuple(
        GroupScale(
            name=name,
            omega=omega,
            tensors=len(members),
            parameters=sum(problem.initial[position].numel() for position in members),
            gain=gains.get(name),
            tried=len(trials[name]),
            ended=trials[name][-1].outcome if trials[name] else None,
        )
        for (name, members), omega in rows
    )


_SHARED_BY = {
    "model": "for all of them",
    "additive": "for additive tensors and one for all others",
    "tensor": "per tensor",
    "kind": "per kind of tensors",
}
_AIMS = {
    "balance": "so that layers keep the variance of their inputs on average",
    "variance": "so that the gradients of different sub-batches vary little",
}


def _describe(config: NIOConfig) -> str:
    word = config.groups if isinstance(config.groups, str) else ""
    bounds = {"loss": config.loss_bound, "gradient norm": config.norm_band}
    if config.search == "published":
        bounds = {"gradient norm": config.gamma}
    named = [name for name, bound in bounds.items() if bound is not None]
    bound = f" under {'bounds' if len(named) > 1 else 'a bound'} on {' and '.join(named)}" if named else ""
    aim = _AIMS.get(config.judged_by, "so that the gradients of different sub-batches agree (GradCosine)")
    return (
        f"Neural Initialization Optimization (NIO) learned scales of the weights, one scalar (omega) "
        f"{_SHARED_BY.get(word, 'per group of tensors')}, {aim}{bound}."
    )


NIO = Method(
    name="nio",
    title="NIO",
    describe=_describe,
    learn=run_search,
    batches=lambda config, options: config.batches,
    most_cost=most_cost,
    own_groups=True,
)
"""The method of this library, beside which the others are baselines."""
