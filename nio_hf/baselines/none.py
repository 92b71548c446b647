"""The initialisation that a model has, measured as the others are."""

from __future__ import annotations

from nio_hf.core.method import Learned, Method, Options, Watch
from nio_hf.core.problem import ScalingProblem


def keep_weights(problem: ScalingProblem, options: Options, watch: Watch) -> Learned:
    """Leave the model as it is; the point of comparison, with omega = 1 for every tensor."""
    return Learned()


NONE = Method(
    name="none",
    title="default initialisation",
    describe=lambda config: "The model has the initialisation that its class gives it.",
    learn=keep_weights,
)
"""No method."""
