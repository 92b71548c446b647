"""The recipes that come with the package, wherever it is installed."""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Sequence
from pathlib import Path

from nio_hf.errors import Problem, RecipeError

DEFAULT_RECIPE = "vit-tiny/digits/nio"


def recipes_dir() -> Path:
    """The folder of the recipes: `nio_hf.recipes` where installed, `recipes/` in a bare checkout."""
    try:
        return Path(str(importlib.resources.files("nio_hf.recipes")))
    except ModuleNotFoundError:
        return Path(str(importlib.resources.files("nio_hf"))).parent / "recipes"


def recipe_names() -> list[str]:
    """Names `model/dataset/variant` of the recipes that come with the package, sorted."""
    root = recipes_dir()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.glob("*/*/*.yaml"))


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe, given by its path or by the name of one that comes with the package.

    Raises:
        RecipeError: where there is neither.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    names = recipe_names()
    name = name_or_path.removesuffix(".yaml").removeprefix("recipes/")
    if name in names:
        return recipes_dir() / f"{name}.yaml"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    fix = "Give the path of a YAML file, or one of: " + ", ".join(near or names)
    raise RecipeError(Problem(name_or_path, "no such recipe file", fix))


def split_arguments(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """(recipe, overrides) of a command line: the recipe stands first, or it is the default."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], list(arguments[1:])
    return DEFAULT_RECIPE, list(arguments)
