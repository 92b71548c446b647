"""What a recipe needs to become a training: one module for each task, loaded when it is needed."""

from __future__ import annotations

import importlib

from nio_hf.metrics import CAUSAL_LM, IMAGE_CLASSIFICATION, MASKED_LM
from nio_hf.recipe.loading import Recipe
from nio_hf.tasks.task import DataFacts, Task
from nio_hf.tasks.trainer import RecipeTrainer

_MODULES = {
    IMAGE_CLASSIFICATION: "nio_hf.tasks.image_classification",
    CAUSAL_LM: "nio_hf.tasks.language",
    MASKED_LM: "nio_hf.tasks.language",
}
"""{task: module whose TASK it is}."""


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe.

    Raises:
        MissingExtraError: where what it needs is not installed.
    """
    task: Task = importlib.import_module(_MODULES[recipe.task]).TASK
    return task


def build_trainer(recipe: Recipe) -> RecipeTrainer:
    """Data, model and Trainer of a recipe.

    Raises:
        NIOError: for data or a model that cannot be loaded or do not go together, or an output directory that cannot
            be written.
    """
    return task_of(recipe).build_trainer(recipe)


def describe_data(recipe: Recipe) -> DataFacts:
    """Facts about the data of a recipe, which are loaded for it."""
    return task_of(recipe).describe_data(recipe)
