"""NIO as a method, beside which the others are baselines."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from nio_hf.core import balance, published
from nio_hf.core.config import NIOConfig
from nio_hf.core.layers import drawn_larger
from nio_hf.core.method import Learned, Method, Options, Watch
from nio_hf.core.problem import ScalingProblem
from nio_hf.core.tensors import ModelTensors


def _learn(problem: ScalingProblem, options: Options, watch: Watch) -> Learned:
    search = published.published_scales if problem.config.search == "published" else balance.balance_scales
    return search(problem, options, watch)


def _most_cost(config: NIOConfig, groups: int, options: Options) -> float:
    """Training steps that it may take, the reports before and after not counted."""
    if config.search == "published":
        return published.most_cost(config)
    # The report after is the measurement of the candidate that is applied.
    return balance.most_cost(config) - config.report_batches


def _left_alone(config: NIOConfig, model: nn.Module, tensors: ModelTensors) -> list[str]:
    """Names of the tensors that computed scales leave alone, unless the user has named the groups."""
    if config.search != "balance" or isinstance(config.groups, Mapping):
        return []
    return drawn_larger(model, tensors)


def _describe(config: NIOConfig) -> str:
    shared = {"model": "for all of them", "additive": "for additive tensors and one for all others", "tensor": "each"}
    words = shared.get(config.groups, "for each group") if isinstance(config.groups, str) else "for each group"
    if config.search == "published":
        aim = "learned by the published algorithm, so that the gradients of different sub-batches agree (GradCosine)"
        bounds = {"gradient norm": config.gamma}
    else:
        aim = (
            "computed, so that layers keep the variance of their inputs on average and additive tensors are as large "
            "as what they are added to"
        )
        bounds = {"loss": config.loss_bound, "gradient norm": config.least_norm}
    named = [name for name, bound in bounds.items() if bound is not None]
    bound = f", under {'bounds' if len(named) > 1 else 'a bound'} on {' and '.join(named)}" if named else ""
    return (
        f"Neural Initialization Optimization (NIO) multiplied the weights by scales, one scalar (omega) {words}, {aim}"
        f"{bound}."
    )


NIO = Method(
    name="nio",
    title="NIO",
    describe=_describe,
    learn=_learn,
    batches=lambda config, options: config.batches,
    most_cost=_most_cost,
    own_groups=True,
    left_alone=_left_alone,
)
"""The method of this library."""
