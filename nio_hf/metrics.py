"""Metrics that trainings are judged by. Only this module knows whether a higher value is better."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of an evaluation, as people read it.

    Attributes:
        key: Name in the metrics of Trainer, e.g. "eval_accuracy".
        name: Name in sentences and on axes, e.g. "accuracy".
        unit: Unit of a value, e.g. "%"; empty for none.
        points: Unit of a difference, e.g. "points of accuracy".
        digits: Number of decimal digits.
        margin: Largest difference that counts as none.
        plateau: Distance from the best value beyond which a learning rate is too high.
        factor: Factor from the value of Trainer to the displayed value.
        lower_is_better: Whether a lower value is better.
        is_share: Whether the value is a share of the samples, with a binomial error.
    """

    key: str
    name: str
    unit: str
    points: str
    digits: int
    margin: float
    plateau: float
    factor: float = 1.0
    lower_is_better: bool = False
    is_share: bool = False

    def worst(self, classes: int) -> float:
        """Value of a uniform guess among `classes` choices, which stands for a training that failed."""
        return math.log(classes) if self.lower_is_better else 100 / classes

    def merit(self, value: float) -> float:
        """Return a number that is higher for a better value."""
        return -value if self.lower_is_better else value

    def gain(self, own: float, other: float) -> float:
        """Return by how much a value is better than another; negative if it is worse."""
        return self.merit(own) - self.merit(other)

    @property
    def label(self) -> str:
        """Name and unit, for axes and tables."""
        return f"{self.name} ({self.unit or self.points})"

    @property
    def heading(self) -> str:
        """Label at the beginning of a line."""
        return self.label[0].upper() + self.label[1:]

    def text(self, value: float) -> str:
        """Return a value with its unit."""
        return f"{value:.{self.digits}f}{self.unit}"


ACCURACY = Metric("eval_accuracy", "accuracy", "%", "points of accuracy", 2, 0.5, 3.0, factor=100.0, is_share=True)
"""Accuracy of image classification, in percent."""
LOSS = Metric("eval_loss", "evaluation loss", "", "nats", 4, 0.01, 0.1, lower_is_better=True)
"""Loss of language modelling: the mean cross-entropy of a token, in nats."""

IMAGE_CLASSIFICATION, CAUSAL_LM, MASKED_LM = "image-classification", "causal-lm", "masked-lm"
METRICS = {IMAGE_CLASSIFICATION: ACCURACY, CAUSAL_LM: LOSS, MASKED_LM: LOSS}
"""{task of a recipe: metric that its trainings are judged by}."""
