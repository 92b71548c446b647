"""Measure where in a model the gradients of sub-batches agree: `nio-hf inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import cached_file

from nio_hf.catalog import find_recipe, split_arguments
from nio_hf.console import exit_status, print_results
from nio_hf.errors import ModelError, Problem, RecipeError, one_line
from nio_hf.files import output_errors, write_atomically
from nio_hf.hub import is_repo_id, run_folder
from nio_hf.hub.run_folder import RECIPE_NAME
from nio_hf.recipe.loading import Recipe, build_recipe, load_recipe
from nio_hf.recipe.strict_yaml import read_overrides
from nio_hf.report import plot_inspection
from nio_hf.report.tables import LAYER_COLUMNS, cosine_with_error, layer_rows, shape_of_sub_batches
from nio_hf.tasks import build_trainer

AT_INIT_DIR_NAME = "inspect-init"
"""Folder for the inspection of the model of a recipe before NIO and training."""
_QUIET = {"report_to": "none", "push_to_hub": False, "nio": False}


def run_inspection(arguments: Sequence[str]) -> int:
    """Inspect the model or recipe of a command line on the report batches of NIO, and return the exit status.

    The numbers and a plot are written into a subfolder of the model's folder or the recipe's `output_dir`.
    """

    def command() -> int:
        name, overrides = split_arguments(arguments)
        if _is_model(name):
            recipe, steps = _recipe_of_model(name, overrides)
            folder_name = run_folder.INSPECTION_DIR_NAME
        else:
            recipe, steps, folder_name = load_recipe(name, overrides, decided=_QUIET), 0, AT_INIT_DIR_NAME
        folder = Path(cast(str, recipe.training.output_dir)) / folder_name
        inspection = build_trainer(recipe).inspect()
        files = {"Numbers": folder / run_folder.INSPECTION_NAME, "Plot by layer": folder / "inspection.png"}
        with output_errors(folder, trained=False):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(files["Numbers"], run_folder.inspection_json(inspection, steps))
            plot_inspection(inspection, files["Plot by layer"])
        measured = inspection.measured
        rows = [
            (f"GradCosine ({shape_of_sub_batches(measured)})", cosine_with_error(measured)),
            ("Gradient norm", f"{measured.grad_norm:.4g}"),
            ("Loss", f"{measured.loss:.4f}"),
        ]
        by_layer = {f"By {by}": (LAYER_COLUMNS, layer_rows(inspection, by)) for by in ("kind", "depth")}
        print_results(name, {"": (("", ""), rows), **by_layer}, (), files)
        return 0

    return exit_status(command, interrupted="")


def _is_model(name: str) -> bool:
    """Whether a name is a model, i.e. a folder or USER/NAME on the Hub; a recipe is a file, or has three parts."""
    if Path(name).is_dir():
        return True
    try:
        find_recipe(name)
    except RecipeError:
        return name.count("/") == 1 and is_repo_id(name)
    return False


def _recipe_of_model(name: str, overrides: Sequence[str]) -> tuple[Recipe, int]:
    """Return the recipe that a model was saved with, and the number of its training steps.

    Raises:
        ModelError: A model that does not exist or cannot be reached.
        RecipeError: A model without a recipe, when no data set is given.
    """
    local = Path(name).is_dir()
    source = str(run_folder.model_folder(Path(name))) if local else name
    given = read_overrides(overrides)
    decided = {**_QUIET, "model_name_or_path": source}
    if "output_dir" not in given:
        decided["output_dir"] = source if local else f"outputs/inspect/{name.rpartition('/')[2]}"
    revision = given["model_revision"].value if "model_revision" in given else None
    file, state = (_find_beside(source, kind, revision) for kind in (RECIPE_NAME, TRAINER_STATE_NAME))
    if file is not None:
        recipe = load_recipe(str(file), overrides, decided=decided)
    elif "dataset_name" in given:
        recipe = build_recipe(Path(name, RECIPE_NAME), read_overrides(overrides, decided))
    else:
        fix = "Say what to measure it on, e.g. --dataset_name imagefolder --data_dir path/to/images"
        raise RecipeError(Problem(name, f"there is no {RECIPE_NAME} beside the model", fix))
    return recipe, 0 if state is None else run_folder.read_run(state.parent).steps


def _find_beside(source: str, name: str, revision: str | None) -> Path | None:
    """Find a file that was saved with a model, in a folder or on the Hub; None if there is no such file.

    Raises:
        ModelError: A model that does not exist or cannot be reached.
    """
    try:
        file = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        fix = "Give a folder with a model, its name on the Hub, or a recipe"
        raise ModelError(Problem(source, f"cannot be loaded: {one_line(error)}", fix)) from error
    return None if file is None else Path(file)
