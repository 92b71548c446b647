"""What a recipe needs to become a training, by its task."""

from __future__ import annotations

import dataclasses

from nio_hf.image_training.building import load_data
from nio_hf.recipe.loading import Recipe


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """What a comparison needs to know of the data of a recipe.

    Attributes:
        choices: number of equal choices of a model that knows nothing: classes, or tokens of the vocabulary.
        evaluated: number of evaluation samples, where all seeds share them; None where each seed has others.
    """

    choices: int
    evaluated: int | None


def describe_data(recipe: Recipe) -> DataFacts:
    """Facts about the data of a recipe, which are loaded for it."""
    data = load_data(recipe)
    counted = data.is_split and hasattr(data.evaluation, "__len__")
    return DataFacts(len(data.class_names), len(data.evaluation) if counted else None)
