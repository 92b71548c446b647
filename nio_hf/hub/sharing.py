"""What of a run may be seen by others: all but the folders of the machine that it ran on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nio_hf.report.run import Facts, Run


def shareable(value: Any) -> Any:
    """A value, and what is nested in it, with absolute paths cut down to their names."""
    if isinstance(value, Mapping):
        return {key: shareable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [shareable(entry) for entry in value]
    if isinstance(value, str) and len(value) > 1 and Path(value.removeprefix("file://")).is_absolute():
        return Path(value).name
    return value


def shareable_recipe(text: str) -> str:
    """A recipe with absolute paths cut down to their names."""
    settings: str = yaml.safe_dump(shareable(yaml.safe_load(text)), sort_keys=False, allow_unicode=True)
    return settings


def shareable_run(run: Run) -> Run:
    """A run with the absolute paths in its facts and its recipe cut down to their names."""
    facts = Facts(**shareable(dataclasses.asdict(run.facts)))
    return dataclasses.replace(run, facts=facts, recipe=None if run.recipe is None else shareable_recipe(run.recipe))
