"""From recipes to trainings: one module for each task, loaded when it is needed."""

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
"""{task: module that defines its TASK}."""


def task_of(recipe: Recipe) -> Task:
    """Load the task of a recipe.

    Raises:
        MissingExtraError: Package that the task needs and that is not installed.
    """
    task: Task = importlib.import_module(_MODULES[recipe.task]).TASK
    return task


def build_trainer(recipe: Recipe) -> RecipeTrainer:
    """Load the data, build the model, and make the Trainer of a recipe.

    Raises:
        NIOError: Data or model that cannot be loaded or do not fit each other, or output directory that cannot be
            written.
    """
    return task_of(recipe).build_trainer(recipe)


def describe_data(recipe: Recipe) -> DataFacts:
    """Load the data of a recipe and return facts about them."""
    return task_of(recipe).describe_data(recipe)
