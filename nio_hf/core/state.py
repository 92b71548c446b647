"""What a run of NIO has to keep so that another one can go on where it stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from nio_hf.core.config import SearchName
from nio_hf.core.descent import DescentState
from nio_hf.core.published import PublishedState
from nio_hf.core.result import GradCosine
from nio_hf.core.scan import ScanState

SearchState = ScanState | DescentState | PublishedState
_STATES: dict[str, Any] = {"scan": ScanState, "gradient": DescentState, "published": PublishedState}


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
        return cls(
            search=fields["search"],
            progress=_STATES[fields["search"]].from_dict(fields["progress"]),
            before=GradCosine.from_dict(fields["before"]),
            seconds=fields["seconds"],
        )


@dataclasses.dataclass(frozen=True)
class Resumption:
    """How a run goes on where another one stopped, and how it lets itself be stopped.

    Attributes:
        state: of the run that stopped, with the same model, batches and settings; None to begin.
        save: called with the state of the run, every `every` iterations, after the last one, and when it is stopped.
        every: iterations from one call of `save` to the next; None to save only when it is stopped.
        should_stop: asked once for each iteration; where it says yes on any process, the run is saved and ends with
            [`StoppedError`].
    """

    state: NIOState | None = None
    save: Callable[[NIOState], None] = lambda state: None
    every: int | None = 10
    should_stop: Callable[[], bool] = lambda: False
