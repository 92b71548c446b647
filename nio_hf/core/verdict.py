"""What a run of NIO achieved, in a word and in a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nio_hf.core.config import NIOConfig
from nio_hf.core.result import GradCosine, IterationRecord, Status

COLLAPSE_LOSS_RISE = 0.25
COLLAPSE_COSINE = 0.95
GAMMA_TOLERANCE = 1.1
STANDARD_ERRORS = 2.0


def describe_change(before: GradCosine, after: GradCosine) -> str:
    """The measurements before and after, in words."""
    return (
        f"GradCosine (D = {before.sub_batches}, B/D = {before.batch_size / before.sub_batches:.4g}) {before.value:.4f} "
        f"-> {after.value:.4f}, gradient norm {before.grad_norm:.4g} -> {after.grad_norm:.4g}, loss at init "
        f"{before.loss:.4f} -> {after.loss:.4f} on held-out batches"
    )


def judge(
    before: GradCosine,
    after: GradCosine,
    gain_standard_error: float,
    history: Sequence[IterationRecord],
    config: NIOConfig,
    gamma: float | None,
    loss_rise: float | None = None,
) -> tuple[Status, str]:
    """Status and message of a run, from the held-out measurements.

    In this order: the data ran out; a collapse is suspected (the loss at init rose by more than 25%, or GC exceeds
    0.95: the model then says the same for every sample); GN exceeds 1.1 gamma; GC rose by more than two standard
    errors; it did not, or there is only one held-out batch. The thresholds are our choice. Where the iterations ended
    by `loss_rise`, that is why there are fewer.
    """
    change = describe_change(before, after)
    if loss_rise is not None:
        done = f"{len(history)} of {config.iterations} iterations"
        change += f" (ended after {done}: the loss of a batch had risen by {loss_rise:.0%})"
    elif len(history) < config.iterations:
        return "data_exhausted", f"The data ended after {len(history)} of {config.iterations} iterations. {change}."
    if after.loss - before.loss > COLLAPSE_LOSS_RISE * abs(before.loss) or after.value > COLLAPSE_COSINE:
        advice = "Lower lr or iterations, or set a lower gamma"
        return "collapse_suspected", f"Collapse suspected: gradients agree at the cost of the loss. {change}. {advice}."
    if gamma is not None and after.grad_norm > GAMMA_TOLERANCE * gamma:
        return (
            "constraint_violated",
            f"The gradient norm ended above gamma = {gamma:.4g}. {change}. Lower lr, or run more iterations.",
        )
    if not math.isfinite(gain_standard_error):
        return "no_improvement", f"One held-out batch does not tell an improvement from noise. {change}."
    if after.value - before.value > STANDARD_ERRORS * gain_standard_error:
        return "improved", f"Improved: {change}."
    return "no_improvement", f"No improvement beyond the noise of the held-out batches. {change}."
