"""Outcome of a run of NIO in a word and in a sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from nio_hf.core.config import NIOConfig
from nio_hf.core.result import GradCosine, GroupScale, Status, paired_standard_error

COLLAPSE_LOSS_RISE = 0.25
COLLAPSE_COSINE = 0.95
GAMMA_TOLERANCE = 1.1
CONFIDENCE = 0.9
_FEW = 6
_T_OF_FEW = (6.314, 2.920, 2.353, 2.132, 2.015)
"""Upper 5% points of Student's t with 1 to 5 degrees of freedom; for more, Fisher's expansion has three digits."""


def t_quantile(degrees: int) -> float:
    """Upper 5% point of Student's t, so that +- it holds 90%."""
    if degrees < _FEW:
        return _T_OF_FEW[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2


def rise_interval(before: GradCosine, after: GradCosine) -> tuple[float, float]:
    """90% interval of the mean rise of GC, paired over the report batches; infinite with fewer than two."""
    if len(after.parts) < 2:
        return -math.inf, math.inf
    rise = after.value - before.value
    half = t_quantile(len(after.parts) - 1) * paired_standard_error(before, after)
    return rise - half, rise + half


def describe_change(before: GradCosine, after: GradCosine) -> str:
    """The measurements before and after, in words."""
    return (
        f"GradCosine (D = {before.sub_batches}, B/D = {before.batch_size / before.sub_batches:.4g}) {before.value:.4f} "
        f"-> {after.value:.4f}, gradient norm {before.grad_norm:.4g} -> {after.grad_norm:.4g}, loss at init "
        f"{before.loss:.4f} -> {after.loss:.4f} on the report batches"
    )


def describe_scales(groups: Sequence[GroupScale]) -> str:
    """The change of the weights in words."""
    scales = [group.omega for group in groups]
    if all(scale == 1 for scale in scales):
        return "No scale was changed: no larger weights are needed, or none keep the bounds"
    if len(groups) == 1:
        return f"All scaled weights were multiplied by {scales[0]:.3g}"
    if len(groups) <= _FEW:
        named = ", ".join(f"{group.name} by {group.omega:.3g}" for group in groups)
        return f"Weights were multiplied: {named}"
    return f"The weights of {len(groups)} groups were multiplied by {min(scales):.3g} to {max(scales):.3g}"


def judge(
    before: GradCosine,
    after: GradCosine,
    groups: Sequence[GroupScale],
    config: NIOConfig,
    *,
    data_exhausted: bool = False,
) -> tuple[Status, str]:
    """Status and message of a run, from the report batches and the scales.

    In this order: the data ran out; no scale was changed. What is computed is then "changed": GC is told and decides
    nothing. Of the published search a collapse is suspected (the loss at init rose by more than 25%, or GC rose above
    0.95, where a model says the same for every sample); GN exceeds 1.1 gamma; the 90% interval of the rise of GC,
    paired over the report batches, is above zero, below zero, or holds it. The thresholds are our choice.
    """
    change, scales = describe_change(before, after), describe_scales(groups)
    if data_exhausted:
        return (
            "data_exhausted",
            f"The data ended before the {config.iterations} iterations were done. {scales}. {change}.",
        )
    if all(group.omega == 1 for group in groups):
        return "unchanged", f"{scales}. {change}."
    if config.search != "published":
        return "changed", f"{scales}. {change}."
    low, high = rise_interval(before, after)
    agrees_too_much = after.value > COLLAPSE_COSINE and low > 0
    if after.loss - before.loss > COLLAPSE_LOSS_RISE * abs(before.loss) or agrees_too_much:
        advice = "Set a lower NIOConfig.gamma, or fewer NIOConfig.iterations"
        return (
            "collapse_suspected",
            f"Collapse suspected: gradients agree at the cost of the loss. {scales}. {change}. {advice}.",
        )
    if config.gamma is not None and after.grad_norm > GAMMA_TOLERANCE * config.gamma:
        advice = "Set a lower NIOConfig.lr, or more NIOConfig.iterations"
        return (
            "constraint_violated",
            f"The gradient norm ended above gamma = {config.gamma:.4g}. {scales}. {change}. {advice}.",
        )
    if low > 0:
        return "improved", f"GradCosine rose. {scales}. {change}."
    if high < 0:
        return "worsened", f"GradCosine fell. {scales}. {change}."
    doubt = "One report batch does not tell" if math.isinf(low) else "The report batches do not tell"
    return "changed", f"{scales}. {doubt} whether GradCosine rose or fell. {change}."
