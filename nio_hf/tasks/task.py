"""What a task is, and what the building of all trainings has in common."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from transformers import PreTrainedModel, set_seed

from nio_hf.errors import ConfigError, ModelError, NIOError, Problem, one_line
from nio_hf.files import ensure_writable
from nio_hf.recipe.loading import Recipe
from nio_hf.recipe.settings import ModelSettings
from nio_hf.tasks.trainer import RecipeTrainer


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
    describe_batch: Callable[[Any], str]


@contextlib.contextmanager
def prepare_building(recipe: Recipe) -> Iterator[None]:
    """The building of a Trainer: the output is checked and random numbers are seeded before it.

    Raises:
        ConfigError: For what Trainer refuses, with the recipe.
        OutputError: Where the output directory cannot be written.
    """
    ensure_writable(Path(cast(str, recipe.training.output_dir)))
    set_seed(recipe.training.seed)
    try:
        yield
    except NIOError:
        raise
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        fix = "Correct the training argument that it is about"
        raise ConfigError(Problem(str(recipe.path), one_line(error), fix)) from error


@contextlib.contextmanager
def name_broken_config(settings: ModelSettings) -> Iterator[None]:
    """Let errors of a configuration that no model can be built from name the setting.

    Raises:
        ModelError: In the place of such an error.
    """
    try:
        yield
    except NIOError:
        raise
    except (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, ImportError) as error:
        fix = f"Correct it for {settings.model_type}"
        raise ModelError(Problem("model_config", f"no model can be built from it: {one_line(error)}", fix)) from error


@contextlib.contextmanager
def name_broken_checkpoint(settings: ModelSettings, what: str) -> Iterator[dict[str, Any]]:
    """Options of `from_pretrained`; errors of a checkpoint that cannot be loaded name it.

    Args:
        settings: Settings of the model.
        what: Kind of the checkpoint, e.g. "an image classification checkpoint".

    Raises:
        ModelError: In the place of such an error.
    """
    try:
        yield {"trust_remote_code": settings.trust_remote_code, "revision": settings.model_revision}
    except NIOError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        found = f"{settings.model_name_or_path!r} cannot be loaded: {one_line(error)}"
        fix = f"Give a folder with {what}, or its name on the Hub"
        raise ModelError(Problem("model_name_or_path", found, fix)) from error
