"""Which task a recipe is of, and which of its settings are of another one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from nio_hf.errors import Problem, RecipeError
from nio_hf.metrics import CAUSAL_LM, IMAGE_CLASSIFICATION, MASKED_LM
from nio_hf.recipe.settings import IMAGE_KEYS, TEXT_KEYS
from nio_hf.recipe.strict_yaml import Setting

ARCHITECTURES: dict[str, Mapping[str, Any]] = {
    IMAGE_CLASSIFICATION: MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    CAUSAL_LM: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MASKED_LM: MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}
"""{task: {model_type of transformers: class of the model}}."""


def find_task(settings: dict[str, Setting], path: Path) -> str:
    """The task that is named, or the only one that the architecture can learn; images where neither tells.

    Raises:
        RecipeError: where the architecture can learn several of them.
    """
    named = settings["task"].value if "task" in settings else None
    if named in ARCHITECTURES:
        return str(named)
    model_type = settings["model_type"].value if "model_type" in settings else None
    able = [task for task, types in ARCHITECTURES.items() if model_type in types]
    if len(able) > 1:
        found = f"nothing, and {model_type} can learn {' and '.join(able)}"
        raise RecipeError(Problem(f"{path}, task", found, f"Set task: {able[-1]}, or {able[0]}"))
    return able[0] if able else IMAGE_CLASSIFICATION


def task_problems(task: str, settings: dict[str, Setting]) -> Iterator[Problem]:
    """The settings that are of another task."""
    foreign, other = (TEXT_KEYS, "text") if task == IMAGE_CLASSIFICATION else (IMAGE_KEYS, "images")
    if task == CAUSAL_LM:
        foreign = foreign | {"mlm_probability"}
    for key in sorted(foreign & settings.keys()):
        what = "masked language modelling" if key == "mlm_probability" and task == CAUSAL_LM else other
        yield Problem(settings[key].where, f"is a setting of {what}, and the task is {task}", "Leave it out")
