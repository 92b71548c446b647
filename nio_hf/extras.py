"""The extras of the package: their modules, and how to install an extra that is missing."""

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
"""{extra: modules that it installs}; the packages are in pyproject.toml."""


def missing_modules(extra: str) -> list[str]:
    """Return the modules of an extra that are not installed."""
    return [module for module in EXTRAS[extra] if importlib.util.find_spec(module.partition(".")[0]) is None]


def require(extra: str, what: str) -> None:
    """Check that an extra is installed.

    Args:
        extra: Name of the extra.
        what: Part of the package that needs the extra, in the plural, for the message.

    Raises:
        MissingExtraError: Missing modules, with the command that installs them.
    """
    missing = missing_modules(extra)
    if missing:
        raise MissingExtraError(Problem(what, f"{', '.join(missing)} not installed", how_to_install(extra)))


def how_to_install(extra: str) -> str:
    """Return the advice to install an extra, with the command."""
    return f"Install what they need: pip install 'nio-hf[{extra}]'"
