"""Recipes and accelerate configurations that come with the package."""

from __future__ import annotations

import difflib
import importlib.resources
from collections.abc import Sequence
from pathlib import Path

from nio_hf.errors import OutputError, Problem, RecipeError

DEFAULT_RECIPE = "vit-tiny/digits/nio"
ACCELERATE_CONFIGS = "accelerate_configs"


def recipes_dir() -> Path:
    """Return the folder of the recipes: `nio_hf.recipes` of an installation, `recipes/` of a bare checkout."""
    try:
        return Path(str(importlib.resources.files("nio_hf.recipes")))
    except ModuleNotFoundError:
        return Path(str(importlib.resources.files("nio_hf"))).parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names `model/dataset/variant` of the recipes that come with the package, sorted."""
    root = recipes_dir()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.glob("*/*/*.yaml"))


def accelerate_config_names() -> list[str]:
    """Return the names of the configurations for `accelerate launch` that come with the package, sorted."""
    return sorted(path.stem for path in (recipes_dir() / ACCELERATE_CONFIGS).glob("*.yaml"))


def recipe_name(path: Path) -> str:
    """Return the name of a recipe that comes with the package, or the file name of another recipe."""
    root = recipes_dir().resolve()
    inside = path.resolve().is_relative_to(root)
    return path.resolve().relative_to(root).with_suffix("").as_posix() if inside else path.name


def flat_recipe_name(path: Path) -> str:
    """Return the name of a recipe without its folders, as MODEL-DATASET-VARIANT."""
    return recipe_name(path).removesuffix(".yaml").replace("/", "-")


def find_recipe(name_or_path: str, *, packaged: bool = False) -> Path:
    """Find the file of a recipe or accelerate configuration.

    Args:
        name_or_path: Path of a file, or name of one that comes with the package.
        packaged: Whether only names are accepted.

    Raises:
        RecipeError: No such file or name, with the name that is most similar.
    """
    path = Path(name_or_path)
    if path.is_file() and not packaged:
        return path
    names = [*recipe_names(), *(f"{ACCELERATE_CONFIGS}/{config}" for config in accelerate_config_names())]
    name = name_or_path.removesuffix(".yaml").removeprefix("recipes/")
    if name in names:
        return recipes_dir() / f"{name}.yaml"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    fix = f"Give the path of a YAML file, or {near[0] if near else 'one that `nio-hf recipes` lists'}"
    raise RecipeError(Problem(name_or_path, "no such recipe file", fix))


def find_accelerate_config(name_or_path: str) -> Path:
    """Find a configuration file for `accelerate launch` by its path, or by its name if it comes with the package.

    Raises:
        RecipeError: No such file or name, with the names that exist.
    """
    path, names = Path(name_or_path), accelerate_config_names()
    if not path.is_file() and name_or_path not in names:
        fix = f"Give the path of a file that `accelerate config` wrote, or one of: {', '.join(names)}"
        raise RecipeError(Problem("config_file", f"{name_or_path!r} is no file", fix))
    return path if path.is_file() else recipes_dir() / ACCELERATE_CONFIGS / f"{name_or_path}.yaml"


def describe(name: str) -> str:
    """Return the description of a recipe that comes with the package, which is its first line."""
    with (recipes_dir() / f"{name}.yaml").open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def copy_recipe(name: str, destination: Path | None, *, replace: bool = False) -> Path:
    """Copy a recipe to a file, or into a folder as MODEL-DATASET-VARIANT.yaml, and return the file.

    Raises:
        RecipeError: A recipe that does not exist, or a file that exists without `replace`.
        OutputError: A file that cannot be written.
    """
    source, target = find_recipe(name), destination or Path()
    if target.is_dir():
        target = target / f"{flat_recipe_name(source)}.yaml"
    if target.exists() and not replace:
        raise RecipeError(Problem(str(target), "exists already", "Give another file, or --force to replace it"))
    try:
        target.write_bytes(source.read_bytes())
    except OSError as error:
        raise OutputError(Problem(str(target), str(error), "Give a file that you can write")) from error
    return target


def split_arguments(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split a command line into the recipe, which stands first or is the default, and its overrides."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], list(arguments[1:])
    return DEFAULT_RECIPE, list(arguments)
