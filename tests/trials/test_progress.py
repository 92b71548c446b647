"""What is said of trials while they are carried out."""

from __future__ import annotations

import pytest
from rich.table import Table

from nio_hf.metrics import ACCURACY, LOSS, Metric
from nio_hf.trials.progress import Progress
from nio_hf.trials.run import Run
from tests.comparison.outcomes import outcome

RUN = Run("selection", "nio", 1e-3, 0.0, 0)


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [
        (ACCURACY, 51.234, "accuracy 51.23%, loss 1.0000, initialisation 3.0 steps (1 s)"),
        (LOSS, 2.34567, "evaluation loss 2.3457, initialisation 3.0 steps (1 s)"),
        (LOSS, None, "failed, the loss is not finite (1 s)"),
    ],
)
def test_a_run_that_has_ended_is_told_by_its_metric(
    metric: Metric, value: float | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("Comparing", 1, Table, metric) as progress:
        progress.started(RUN)
        progress.ended(RUN, outcome(value, cost_steps=3.0))
    assert capsys.readouterr().err == f"[1/1] {RUN.name}: {said}\n"
