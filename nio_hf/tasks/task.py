"""What a task is, and what the building of all trainings has in common."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from torch import nn
from transformers import PreTrainedModel, set_seed

from nio_hf.catalog import recipe_name
from nio_hf.errors import ConfigError, NIOError, Problem, one_line
from nio_hf.files import ensure_writable
from nio_hf.recipe.loading import Recipe, recipe_yaml
from nio_hf.training.optimizers import optimizer_options
from nio_hf.training.trainer import Extras, RecipeTrainer, Source


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """What a comparison needs to know of the data of a recipe.

    Attributes:
        choices: Number of equal choices of a model that knows nothing: classes, or tokens of the vocabulary.
        evaluated: Number of evaluation samples, where all seeds share them; None where each seed has others.
    """

    choices: int
    evaluated: int | None


@dataclasses.dataclass(frozen=True)
class Task:
    """How recipes of a task become trainings.

    Attributes:
        build_trainer: (recipe) -> its Trainer, with data and model.
        build_model: (recipe) -> its model, built anew; without memory for weights on the meta device.
        check_model: (recipe, model) -> nothing; an error of ours where they do not go together.
        describe_data: (recipe) -> facts about its data, which are loaded for it.
        describe_batch: (trainer) -> what its first batches hold, in words; both are read for it.
    """

    build_trainer: Callable[[Recipe], RecipeTrainer]
    build_model: Callable[[Recipe], PreTrainedModel]
    check_model: Callable[[Recipe, PreTrainedModel], None]
    describe_data: Callable[[Recipe], DataFacts]
    describe_batch: Callable[[RecipeTrainer], str]


@contextlib.contextmanager
def building(recipe: Recipe) -> Iterator[None]:
    """The building of a Trainer: the output is checked and random numbers are seeded before it.

    Raises:
        ConfigError: for what Trainer refuses, with the recipe.
        OutputError: where the output directory cannot be written.
    """
    ensure_writable(Path(cast(str, recipe.training.output_dir)))
    set_seed(recipe.training.seed)
    try:
        yield
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        if isinstance(error, NIOError):
            raise
        fix = "Correct the training argument that it is about"
        raise ConfigError(Problem(str(recipe.path), one_line(error), fix)) from error


def extras_of(recipe: Recipe, model: nn.Module, about_data: str | None = None) -> Extras:
    """What a recipe asks of the Trainer of a model beside its arguments.

    Args:
        recipe: The recipe.
        model: The model.
        about_data: What is to be said of the data set beside its name; None for its configuration.
    """
    asked = recipe.optimization
    return Extras(
        no_weight_decay=asked.no_weight_decay,
        repeats=recipe.augmentation.repeated_augmentation,
        source=Source(
            recipe=recipe_name(recipe.path),
            recipe_text=recipe_yaml(recipe),
            dataset=cast(str, recipe.data.dataset_name),
            dataset_config=about_data or recipe.data.dataset_config_name,
            dataset_split=recipe.data.eval_split,
        ),
        optimizer=optimizer_options(asked.optimizer, recipe.training, model),
        ema_decay=asked.ema_decay,
    )
