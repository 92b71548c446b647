"""What is known of a comparison so far."""

from __future__ import annotations

import dataclasses

from nio_hf.comparison import analysis
from nio_hf.comparison.analysis import Cell, Gain, Outcomes, Share, Verdict
from nio_hf.comparison.plan import Choice, Plan


@dataclasses.dataclass(frozen=True)
class Findings:
    """What is known of a comparison so far.

    Attributes:
        title: of the recipe.
        plan: what it consists of.
        outcomes: of the runs that have ended.
        cells: of the grid.
        chosen: settings of each arm; empty while the grid is not through.
        gains: of warmup over no warmup, by learning rate, on the seeds of the selection.
        tested_gain: the largest of them, on fresh seeds; None while there is none.
        verdicts: of each arm; empty while there is none.
        shares: what each initialisation adds; empty likewise.
        images: of the evaluation data, where they are a split of their own; None where each seed has others.
    """

    title: str
    plan: Plan
    outcomes: Outcomes
    cells: list[Cell]
    chosen: list[Choice]
    gains: list[Gain]
    tested_gain: Gain | None
    verdicts: list[Verdict]
    shares: list[Share]
    images: int | None = None

    @classmethod
    def of(cls, title: str, plan: Plan, outcomes: Outcomes, chance: float, images: int | None = None) -> Findings:
        """What follows from some outcomes."""
        found = analysis.cells(plan, outcomes, chance)
        complete = len(found) == sum(len(plan.ratios(arm)) for arm in plan.arms) * len(plan.learning_rates)
        chosen = analysis.choose(found) if complete else []
        gains = analysis.warmup_gains(found)
        verdicts = analysis.verdicts(plan, chosen, outcomes, chance)
        shares = analysis.shares(plan, chosen, outcomes, chance)
        tested = analysis.tested_gain(plan, gains, outcomes, chance) if complete else None
        return cls(title, plan, outcomes, found, chosen, gains, tested, verdicts, shares, images)

    @property
    def no_warmup_loses(self) -> bool:
        """Whether the gain of warmup is significant: where it is not, there is nothing to replace."""
        return self.tested_gain is not None and self.tested_gain.gain.low > 0
