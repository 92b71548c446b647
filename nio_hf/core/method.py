"""A method of initialisation as a record, with the arguments and the result of its own part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from nio_hf.core.collective import Collective
from nio_hf.core.config import NIOConfig
from nio_hf.core.problem import ScalingProblem
from nio_hf.core.result import GradCosine, GroupScale, IterationRecord
from nio_hf.core.tensors import ModelTensors
from nio_hf.errors import ConfigError, Problem, StoppedError

OnIteration = Callable[[IterationRecord], None]
Options = Mapping[str, Any]
Check = tuple[str, Any, bool, str]
"""(option, its value, whether it is sound, how to fix it)."""


@dataclasses.dataclass(frozen=True)
class Watch:
    """Functions that follow a run, and may stop it.

    Attributes:
        on_iteration: Function that is called with the record of each iteration.
        on_trial: Function that is called with what the next iteration tries, in words.
        should_stop: Function that is asked once for each iteration whether the run has to end.
    """

    on_iteration: OnIteration | None = None
    on_trial: Callable[[str], None] | None = None
    should_stop: Callable[[], bool] | None = None

    def tries(self, words: str) -> None:
        """Say what comes next."""
        if self.on_trial is not None:
            self.on_trial(words)

    def sees(self, record: IterationRecord) -> None:
        """Say what became of it."""
        if self.on_iteration is not None:
            self.on_iteration(record)

    def stop_if_asked(self, collective: Collective, *flags: bool) -> list[bool]:
        """End a run where any process asks for it; otherwise tell of at most one flag whether any process has set it.

        Raises:
            StoppedError: Where a process asks for it.
        """
        stopped, *others = collective.any(self.should_stop is not None and self.should_stop(), *flags)
        if stopped:
            raise StoppedError(Problem("NIO", "stopped before it was through", "Start again"))
        return others


@dataclasses.dataclass(frozen=True)
class Learned:
    """Result of a method.

    Attributes:
        omega: (m,) scale of each scaled tensor; None for the ratio of its norm to the former one.
        groups: Groups with their scales; empty where each tensor stands for itself.
        members: {group: positions of its tensors among the scaled ones}, where they are not those of the problem.
        history: One record for each iteration.
        cost: Training steps of arithmetic, reports before and after not counted, but for those of `after`.
        after: GradCosine on the report batches at the new weights; None where it has not been measured.
        data_exhausted: Whether the run ended for want of data.
        micro_batch_size: Samples computed at once in the end.
    """

    omega: Sequence[float] | None = None
    groups: Sequence[GroupScale] = ()
    members: Mapping[str, tuple[int, ...]] | None = None
    history: Sequence[IterationRecord] = ()
    cost: float = 0.0
    after: GradCosine | None = None
    data_exhausted: bool = False
    micro_batch_size: int | None = None


def unsound(where: str, checks: Iterable[Check]) -> list[Problem]:
    """The problems that checks of options have found; `where` stands before the name of an option."""
    return [Problem(f"{where}.{name}", repr(value), fix) for name, value, sound, fix in checks if not sound]


class Learn(Protocol):
    """The part of a method that is its own."""

    def __call__(self, problem: ScalingProblem, options: Options, watch: Watch) -> Learned:
        """Leave the new weights in the scaled tensors of the model."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of initialisation.

    Attributes:
        name: Name in settings.
        title: Name as its paper writes it.
        describe: Function that says what the method does with some settings, in a sentence.
        learn: The method's own part.
        batches: (config, options) -> batches that it takes, those of the report not counted.
        most_cost: (config, groups, options) -> training steps that it may take, reports not counted; None where that
            is not known beforehand.
        options: {name: default} of the method's own options.
        check: (options) -> checks of them.
        own_groups: Whether the settings say which tensors share a scale; otherwise each has its own.
        left_alone: (config, model, tensors) -> names of tensors that it does not scale, though they could be.
    """

    name: str
    title: str
    describe: Callable[[NIOConfig], str]
    learn: Learn
    batches: Callable[[NIOConfig, Options], int] = lambda config, options: 0
    most_cost: Callable[[NIOConfig, int, Options], float | None] = lambda config, groups, options: 0.0
    options: Options = dataclasses.field(default_factory=dict)
    check: Callable[[Options], Iterable[Check]] = lambda options: ()
    own_groups: bool = False
    left_alone: Callable[[NIOConfig, nn.Module, ModelTensors], Sequence[str]] = lambda config, model, tensors: ()

    @property
    def subject(self) -> str:
        """The title as a sentence begins with it."""
        return self.title[:1].upper() + self.title[1:]

    def checked(self, given: Options | None) -> dict[str, Any]:
        """All options, with defaults for those that are not given, and tuples for lists.

        Raises:
            ConfigError: Lists the options that are unknown or out of range.
        """
        given = dict(given or {})
        known = ", ".join(self.options)
        fix = f"Choose from {known}" if known else "Leave it out: it has none of its own"
        problems = [
            Problem(f"{self.name}.{name}", f"is no option of {self.name}", fix)
            for name in given
            if name not in self.options
        ]
        options = {**self.options, **{name: value for name, value in given.items() if name in self.options}}
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        problems += unsound(self.name, self.check(options))
        if problems:
            raise ConfigError(*problems)
        return options
