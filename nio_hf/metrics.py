"""What a training is judged by, so that nothing else need know whether more or less of it is better."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of an evaluation, as people read it.

    Attributes:
        key: of the metrics of Trainer, e.g. "eval_accuracy".
        name: in sentences and axes, e.g. "accuracy".
        unit: behind a value, e.g. "%"; empty for none.
        points: what a difference is counted in, e.g. "points of accuracy".
        factor: from the value of Trainer to the one that is shown.
        lower_is_better: whether less of it is better.
        digits: behind the point, of a value that is shown.
        margin: difference that counts as none.
        plateau: distance from the best value at which a learning rate is too high.
        is_share: whether it is a share of samples, with a binomial error.
    """

    key: str
    name: str
    unit: str
    points: str
    factor: float = 1.0
    lower_is_better: bool = False
    digits: int = 2
    margin: float = 0.5
    plateau: float = 3.0
    is_share: bool = False

    def worst(self, classes: int) -> float:
        """What a model has that knows nothing of `classes` equal choices, by which a failed training counts."""
        return math.log(classes) if self.lower_is_better else 100 / classes

    def merit(self, value: float) -> float:
        """A number that is the higher, the better a value is."""
        return -value if self.lower_is_better else value

    def gain(self, own: float, other: float) -> float:
        """By how much one value is better than another, above 0 where it is."""
        return self.merit(own) - self.merit(other)

    @property
    def label(self) -> str:
        """Its name, and what its values are counted in, for axes and tables."""
        return f"{self.name} ({self.unit or self.points})"

    @property
    def heading(self) -> str:
        """The label at the beginning of a line."""
        return self.label[0].upper() + self.label[1:]

    @property
    def grid_digits(self) -> int:
        """Digits behind the point, of a value in a grid of many."""
        return self.digits - 1

    def text(self, value: float) -> str:
        """A value with its unit."""
        return f"{value:.{self.digits}f}{self.unit}"


ACCURACY = Metric(
    "eval_accuracy",
    "accuracy",
    "%",
    "points of accuracy",
    factor=100.0,
    digits=2,
    margin=0.5,
    plateau=3.0,
    is_share=True,
)
"""Of image classification, in percent."""
LOSS = Metric("eval_loss", "evaluation loss", "", "nats", lower_is_better=True, digits=4, margin=0.01, plateau=0.1)
"""Of language modelling: the mean cross-entropy of a token, in nats."""

IMAGE_CLASSIFICATION, CAUSAL_LM, MASKED_LM = "image-classification", "causal-lm", "masked-lm"
METRICS = {IMAGE_CLASSIFICATION: ACCURACY, CAUSAL_LM: LOSS, MASKED_LM: LOSS}
"""{task of a recipe: the metric that it is judged by}."""
