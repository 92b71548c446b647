"""The data of a run, from which page and model card are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nio_hf.core.layerwise import GradientInspection
from nio_hf.core.result import InitResult


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts of a run that weights and logs do not tell.

    Attributes:
        model: Name of the model's class.
        model_type: Name of the architecture in transformers; None for a module of the user.
        parameters: Number of all parameters.
        classes: Number of classes; None for a model that is no classifier.
        dataset: Name of the data set, as it is loaded.
        dataset_config: Configuration of the data set.
        dataset_split: Split of the evaluation.
        recipe: Name of the recipe; None without one.
        arguments: Training arguments that differ from their defaults.
        processes: Number of processes.
        device: Type of the device.
        started_from: Initialised checkpoint that was loaded; None for a model that was built anew.
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


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its folder holds it.

    Attributes:
        name: Name of the folder or the repository.
        facts: Model, data and settings.
        result: Result of the initialisation; None without one.
        versions: Versions of the libraries.
        steps: Number of training steps so far; 0 for an initialised checkpoint.
        max_steps: Number of planned training steps.
        metrics: Metrics of the Trainer for the weights in the folder; `train_runtime` covers all sessions.
        log_history: Log history of the Trainer.
        recipe: Recipe as YAML, with the overrides of the run; None without one.
        inspection: Inspection by layer; None without one.
        has_ended: Whether the training has ended, at `max_steps` or before.
        kept_step: Training step of the weights; None for the last one.
        sample: Text that the trained model has written; None without one.
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
        """Whether the model has been trained."""
        return self.steps > 0

    @property
    def is_finished(self) -> bool:
        """Whether the training has come to its end."""
        return self.has_ended or self.steps >= self.max_steps

    @property
    def has_accuracy(self) -> bool:
        """Whether an accuracy was logged."""
        return any("eval_accuracy" in entry for entry in self.log_history)

    @property
    def nio_share(self) -> float | None:
        """Share of the initialisation in the seconds of initialisation and training; None if one is not known."""
        training = self.metrics.get("train_runtime")
        if self.result is None or training is None:
            return None
        return self.result.seconds / (self.result.seconds + training)
