"""The extras of the package: what they bring, and what to install where one is missing."""

from __future__ import annotations

import importlib.util

from nio_hf.errors import MissingExtraError, Problem

EXTRAS = {
    "report": ("matplotlib", "PIL"),
    "recipes": (
        *("annotated_types", "datasets", "evaluate", "filelock", "kornia", "matplotlib", "PIL", "pyarrow"),
        *("pydantic", "ruamel.yaml", "scipy", "sklearn"),
    ),
}
"""{extra: modules that it brings}; the packages are in pyproject.toml."""


def missing_modules(extra: str) -> list[str]:
    """Modules of an extra that are not installed."""
    return [module for module in EXTRAS[extra] if importlib.util.find_spec(module.partition(".")[0]) is None]


def require(extra: str, what: str) -> None:
    """Refuse to go on without an extra.

    Args:
        extra: its name.
        what: what needs it, as the subject of a sentence in the plural.

    Raises:
        MissingExtraError: with the command that installs it.
    """
    missing = missing_modules(extra)
    if missing:
        raise MissingExtraError(Problem(what, f"{', '.join(missing)} not installed", how_to_install(extra)))


def how_to_install(extra: str) -> str:
    """What to do to have an extra."""
    return f"Install what they need: pip install 'nio-hf[{extra}]'"
