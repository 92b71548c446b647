"""What a recipe says beside the training arguments: the model and the data."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass
class ModelSettings:
    """The model: built anew from its configuration, or loaded.

    Attributes:
        model_type: name of a transformers architecture with an image classification head, e.g. "vit" or "swin".
        model_config: fields of its configuration that differ from the defaults, e.g. `{hidden_size: 192}`.
        model_name_or_path: a checkpoint to start from instead, e.g. one that `nio-hf init` wrote.
    """

    model_type: str | None = None
    model_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    model_name_or_path: str | None = None


@dataclasses.dataclass
class DataSettings:
    """The images.

    Attributes:
        dataset_name: "digits", or whatever [`datasets.load_dataset`] takes: a Hub name, a local folder.
        dataset_config_name: configuration of the data set.
        train_split: split to train on.
        eval_split: split to evaluate on; None sets `eval_fraction` of the training split aside.
        eval_fraction: part of the training split to evaluate on, where there is no `eval_split`.
        image_column: None for the column of images, where there is one.
        label_column: None for the column of class labels, where there is one.
    """

    dataset_name: str = "digits"
    dataset_config_name: str | None = None
    train_split: str = "train"
    eval_split: str | None = None
    eval_fraction: float = 0.2
    image_column: str | None = None
    label_column: str | None = None
