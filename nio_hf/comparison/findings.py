"""What is known of a comparison so far."""

from __future__ import annotations

import dataclasses

from nio_hf.comparison import analysis
from nio_hf.comparison.analysis import Cell, Gain, Outcomes, Share, Stability, Verdict
from nio_hf.comparison.plan import Choice, Plan
from nio_hf.metrics import Metric


@dataclasses.dataclass(frozen=True)
class Findings:
    """What is known of a comparison so far.

    Attributes:
        title: of the recipe.
        plan: what it consists of.
        outcomes: of the runs that have ended.
        metric: that they are judged by.
        cells: of the grid.
        chosen: settings of each arm; empty while the grid is not through.
        gains: of warmup over no warmup, by learning rate, on the seeds of the selection.
        tested_gain: the largest of them, on fresh seeds; None while there is none.
        verdicts: of each arm; empty while there is none.
        shares: what each initialisation adds; empty likewise.
        evaluated: number of evaluation samples, where all seeds share them; None where each seed has others.
    """

    title: str
    plan: Plan
    outcomes: Outcomes
    metric: Metric
    cells: list[Cell]
    chosen: list[Choice]
    gains: list[Gain]
    tested_gain: Gain | None
    verdicts: list[Verdict]
    shares: list[Share]
    evaluated: int | None = None

    @classmethod
    def of(
        cls,
        title: str,
        plan: Plan,
        outcomes: Outcomes,
        metric: Metric,
        worst: float,
        evaluated: int | None = None,
    ) -> Findings:
        """What follows from some outcomes; a run that failed counts as the value `worst`."""
        found = analysis.cells(plan, outcomes, worst)
        complete = len(found) == sum(len(plan.ratios(arm)) for arm in plan.arms) * len(plan.learning_rates)
        chosen = analysis.choose(found, metric) if complete else []
        gains = analysis.warmup_gains(found, metric)
        verdicts = analysis.verdicts(plan, chosen, outcomes, metric, worst)
        shares = analysis.shares(plan, chosen, outcomes, metric, worst)
        tested = analysis.tested_gain(plan, gains, outcomes, metric, worst) if complete else None
        return cls(title, plan, outcomes, metric, found, chosen, gains, tested, verdicts, shares, evaluated)

    def at_best_length(self, arm: str, rate: float) -> Cell | None:
        """The cell of an arm at a learning rate, at the length of warmup that is best there."""
        return analysis.at_best_length(self.cells, arm, rate, self.metric)

    def stability(self, arm: str) -> Stability:
        """How high a learning rate an arm bears."""
        return analysis.stability(self.cells, arm, self.metric)

    @property
    def no_warmup_loses(self) -> bool:
        """Whether the gain of warmup is significant: where it is not, there is nothing to replace."""
        return self.tested_gain is not None and self.tested_gain.gain.low > 0
