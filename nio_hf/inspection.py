"""Measure where in a model the gradients of sub-batches agree: `nio-hf inspect`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import yaml
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import cached_file

from nio_hf.catalog import find_recipe, split_arguments
from nio_hf.console import exit_status, print_inspection
from nio_hf.core import GradientInspection
from nio_hf.errors import ModelError, Problem, RecipeError, one_line
from nio_hf.files import output_errors, write_atomically
from nio_hf.hub import is_repo_id
from nio_hf.hub.run_folder import (
    INSPECTION_DIR_NAME,
    INSPECTION_NAME,
    RECIPE_NAME,
    inspection_json,
    model_folder,
    read_run,
)
from nio_hf.recipe.loading import Recipe, load_recipe
from nio_hf.recipe.strict_yaml import read_overrides, with_values
from nio_hf.report import plot_inspection
from nio_hf.report.tables import LAYER_COLUMNS, layer_rows, shape_of_sub_batches
from nio_hf.tasks import build_trainer

AT_INIT_DIR_NAME = "inspect-init"
"""Where the inspection of a recipe's model is written, as it is before NIO and training."""
_QUIET = {"report_to": "none", "push_to_hub": False, "nio": False}


def inspect_recipe(recipe: Recipe, directory: Path, steps: int) -> tuple[GradientInspection, dict[str, Path]]:
    """Measure the model of a recipe on the batches that NIO sets aside, and write numbers and plot.

    Args:
        recipe: with model and data.
        directory: to write into.
        steps: that the model was trained for.

    Returns:
        What was measured, and {what: file} of what was written.

    Raises:
        NIOError: for data or a model that cannot be loaded or do not go together, or that NIO cannot measure.
    """
    inspection = build_trainer(recipe).inspect()
    written = {"Numbers": directory / INSPECTION_NAME, "Plot by layer": directory / "inspection.png"}
    with output_errors(directory, trained=False):
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(written["Numbers"], inspection_json(inspection, steps))
        plot_inspection(inspection, written["Plot by layer"])
    return inspection, written


def run_inspection(arguments: Sequence[str]) -> int:
    """Inspect the model or recipe of a command line; returns the exit status."""

    def command() -> int:
        name, overrides = split_arguments(arguments)
        overrides = with_values(overrides, _QUIET)
        with _model_of(name, overrides) if _is_model(name) else _recipe_of(name, overrides) as (recipe, folder, steps):
            inspection, written = inspect_recipe(recipe, folder, steps)
        measured = inspection.measured
        tables = {f"By {by}": layer_rows(inspection, by) for by in ("kind", "depth")}
        rows = [
            (f"GradCosine ({shape_of_sub_batches(measured)})", f"{measured.value:.4f} ± {measured.standard_error:.4f}"),
            ("Gradient norm", f"{measured.grad_norm:.4g}"),
            ("Loss", f"{measured.loss:.4f}"),
        ]
        print_inspection(name, rows, LAYER_COLUMNS, tables, written)
        return 0

    return exit_status(command, interrupted="")


def _is_model(name: str) -> bool:
    """Whether it names a model: a folder, or USER/NAME on the Hub; recipes are files, or of three parts."""
    if Path(name).is_dir():
        return True
    try:
        find_recipe(name)
    except RecipeError:
        return name.count("/") == 1 and is_repo_id(name)
    return False


@contextlib.contextmanager
def _recipe_of(name: str, overrides: Sequence[str]) -> Iterator[tuple[Recipe, Path, int]]:
    """A recipe, the folder to write into, and no steps: its model is built anew."""
    recipe = load_recipe(name, overrides)
    yield recipe, Path(cast(str, recipe.training.output_dir)) / AT_INIT_DIR_NAME, 0


@contextlib.contextmanager
def _model_of(name: str, overrides: Sequence[str]) -> Iterator[tuple[Recipe, Path, int]]:
    """The recipe that a model was saved with, the folder to write into, and the steps that it was trained for.

    Raises:
        RecipeError: for a model without a recipe, where no data set is given either.
    """
    local = Path(name).is_dir()
    source = str(model_folder(Path(name))) if local else name
    output_dir = source if local else f"outputs/inspect/{name.rpartition('/')[2]}"
    given = read_overrides(overrides)
    settings = {"model_name_or_path": source}
    if "output_dir" not in given:
        settings["output_dir"] = output_dir
    with tempfile.TemporaryDirectory() as folder:
        revision = given["model_revision"].value if "model_revision" in given else None
        file = _find_beside(source, RECIPE_NAME, revision)
        if file is None:
            if "dataset_name" not in given:
                fix = "Say what to measure it on, e.g. --dataset_name imagefolder --data_dir path/to/images"
                raise RecipeError(Problem(name, f"there is no {RECIPE_NAME} beside the model", fix))
            file = Path(folder) / RECIPE_NAME
            file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        recipe = load_recipe(str(file), with_values(overrides, settings))
        yield recipe, Path(cast(str, recipe.training.output_dir)) / INSPECTION_DIR_NAME, _steps(source, revision)


def _find_beside(source: str, name: str, revision: str | None) -> Path | None:
    """A file that was saved with a model, in a folder or on the Hub; None where there is none of that name.

    Raises:
        ModelError: for a model that is not there, or not to be reached.
    """
    try:
        file = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        fix = "Give a folder with a model, its name on the Hub, or a recipe"
        raise ModelError(Problem(source, f"cannot be loaded: {one_line(error)}", fix)) from error
    return None if file is None else Path(file)


def _steps(source: str, revision: str | None) -> int:
    """Steps that a model was trained for."""
    file = _find_beside(source, TRAINER_STATE_NAME, revision)
    return 0 if file is None else read_run(file.parent).steps
