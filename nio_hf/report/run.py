"""What is known of a run, from which page and model card are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nio_hf.core.layerwise import GradientInspection
from nio_hf.core.result import InitResult

_BEFORE_NAME = "For"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What weights and logs do not tell of a run.

    Attributes:
        model: name of the model's class.
        model_type: name of the architecture in transformers; None for a module of the user's own.
        parameters: number of all parameters.
        classes: of a classifier.
        dataset: name of the data set, as it is loaded.
        dataset_config: its configuration.
        dataset_split: that is evaluated on.
        recipe: name of the recipe; None without one.
        arguments: the training arguments that differ from their defaults.
        processes: that trained together.
        device: kind of device.
        started_from: the initialised checkpoint that was loaded; None for a model that was built anew.
    """

    model: str
    model_type: str | None = None
    parameters: int = 0
    classes: int | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    recipe: str | None = None
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    processes: int = 1
    device: str = "cpu"
    started_from: str | None = None

    @property
    def architecture(self) -> str:
        """The model's class without its task, e.g. "ViT"."""
        return self.model.partition(_BEFORE_NAME)[0] or self.model


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its folder holds it.

    Attributes:
        name: of the folder, or of the repository.
        facts: what it was made from.
        result: of the initialisation; None where there was none.
        versions: of the libraries.
        steps: optimiser steps that were trained; 0 for an initialised checkpoint.
        max_steps: that were meant to be trained.
        metrics: of the Trainer, for the weights that the folder holds; `train_runtime` is that of all sessions.
        log_history: of the Trainer.
        recipe: the recipe as YAML, with the overrides of the run; None without one.
        inspection: by layer, where the folder has one.
        has_ended: whether the training came to an end, be it before `max_steps`.
        kept_step: step that the weights are of, where that is not the last one.
        sample: text that the trained model has written; None without one.
    """

    name: str
    facts: Facts
    result: InitResult | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    steps: int = 0
    max_steps: int = 0
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    log_history: Sequence[Mapping[str, Any]] = ()
    recipe: str | None = None
    inspection: GradientInspection | None = None
    has_ended: bool = False
    kept_step: int | None = None
    sample: str | None = None

    @property
    def is_trained(self) -> bool:
        """Whether it holds more than an initialisation."""
        return self.steps > 0

    @property
    def is_finished(self) -> bool:
        """Whether its training came to its end."""
        return self.has_ended or self.steps >= self.max_steps

    @property
    def has_accuracy(self) -> bool:
        """Whether an accuracy was logged."""
        return any("eval_accuracy" in entry for entry in self.log_history)

    @property
    def nio_share(self) -> float | None:
        """Seconds of the initialisation as a share of those of both together; None where one is not known."""
        training = self.metrics.get("train_runtime")
        if self.result is None or training is None:
            return None
        return self.result.seconds / (self.result.seconds + training)
