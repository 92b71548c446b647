"""Interface of a task, and the parts that all tasks build trainings with."""

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
    """Facts about the data of a recipe, for comparisons.

    Attributes:
        choices: Number of classes, or of tokens of the vocabulary: the equal choices of a model that knows nothing.
        evaluated: Number of evaluation samples that all seeds share; None where each seed has others.
    """

    choices: int
    evaluated: int | None


@dataclasses.dataclass(frozen=True)
class Task:
    """Functions that make trainings of the recipes of a task.

    Attributes:
        build_trainer: Function from a recipe to its Trainer, with data and model.
        build_model: Function from a recipe to its model, built anew; on the meta device it takes no memory.
        check_model: Function of (recipe, model) that raises a NIOError where they do not fit each other.
        describe_data: Function from a recipe to facts about its data, which it loads.
        describe_batch: Function from a Trainer to a description of its first batches, which it reads.
    """

    build_trainer: Callable[[Recipe], RecipeTrainer]
    build_model: Callable[[Recipe], PreTrainedModel]
    check_model: Callable[[Recipe, PreTrainedModel], object]
    describe_data: Callable[[Recipe], DataFacts]
    describe_batch: Callable[[Any], str]


@contextlib.contextmanager
def prepare_building(recipe: Recipe) -> Iterator[None]:
    """Check the output directory and seed random numbers, before a Trainer is built in the context.

    Raises:
        ConfigError: Argument that Trainer refuses, with the recipe.
        OutputError: Output directory that cannot be written.
    """
    ensure_writable(Path(cast(str, recipe.training.output_dir)))
    set_seed(recipe.training.seed)
    try:
        yield
    except NIOError:
        raise
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        fix = "Correct the training argument behind it"
        raise ConfigError(Problem(str(recipe.path), one_line(error), fix)) from error


@contextlib.contextmanager
def name_broken_config(settings: ModelSettings) -> Iterator[None]:
    """Turn errors while a model is built into a ModelError that names the setting of its configuration."""
    try:
        yield
    except NIOError:
        raise
    except (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, ImportError) as error:
        fix = f"Correct it for {settings.model_type}"
        raise ModelError(Problem("model_config", f"no model can be built from it: {one_line(error)}", fix)) from error


@contextlib.contextmanager
def name_broken_checkpoint(settings: ModelSettings, what: str) -> Iterator[dict[str, Any]]:
    """Give options of `from_pretrained`, and turn errors of loading into a ModelError that names the checkpoint.

    `what` is its kind, e.g. "an image classification checkpoint".
    """
    try:
        yield {"trust_remote_code": settings.trust_remote_code, "revision": settings.model_revision}
    except NIOError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        found = f"{settings.model_name_or_path!r} cannot be loaded: {one_line(error)}"
        fix = f"Give a folder with {what}, or its name on the Hub"
        raise ModelError(Problem("model_name_or_path", found, fix)) from error
