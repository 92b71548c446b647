"""The progress bar of a run of NIO, in training steps."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from nio_hf.core import IterationRecord, NIOResult


class NIOProgress:
    """A bar whose end is what a run may cost at most, where that is known.

    Args:
        title: Title of the method.
        cost: Training steps that the run may cost; None where that is not known.
        hidden: Whether nothing is shown.
    """

    def __init__(self, title: str, cost: float | None, hidden: bool) -> None:
        look = "{desc}: {n:.0f} steps [{elapsed}{postfix}]"
        if cost:
            look = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} steps [{elapsed}{postfix}]"
        self._title = title
        self._bar: Any = tqdm(total=cost, desc=title, unit="step", disable=hidden, bar_format=look)

    def tell_trial(self, trial: str) -> None:
        """Say what is tried next."""
        self._bar.set_description_str(f"{self._title}: {trial}")

    def advance(self, record: IterationRecord) -> None:
        """Move by what an iteration cost, and show what it found."""
        values = {"GC": record.grad_cosine, "GN": record.grad_norm, "loss": record.loss}
        shown = {name: f"{value:.3g}" for name, value in values.items() if value is not None}
        self._bar.set_postfix(**shown, last=record.outcome.replace("_", " "), refresh=False)
        # A bar in this format cannot be drawn beyond its end.
        self._bar.total = self._bar.total and max(self._bar.total, self._bar.n + record.cost)
        self._bar.update(record.cost)

    def finish(self, result: NIOResult) -> None:
        """Move to the end, which is what the run did cost."""
        self._bar.set_description_str(self._title, refresh=False)
        self._bar.total = self._bar.total and result.cost
        self._bar.update(result.cost - self._bar.n)
        self._bar.refresh()

    def __enter__(self) -> NIOProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
