"""`ImageTrainer`: the Trainer of image classifiers, with augmentation on the device and soft labels."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from nio_hf.trainer import NIOTrainingArguments
from nio_hf.training.trainer import Extras, RecipeTrainer
from nio_hf.vision.augmentation import BatchAugmentation
from nio_hf.vision.losses import classification_loss
from nio_hf.vision.metrics import TOP_K, classification_metrics, predictions_and_losses
from nio_hf.vision.samples import ImageSamples, ImageStream, collate_images

NIOAugment = Literal["clean", "augmented", "mixed"]
Samples = ImageSamples | ImageStream


@dataclasses.dataclass(frozen=True)
class ImageTrainingData:
    """The samples of a training.

    Attributes:
        train: bytes, cropped and flipped.
        evaluation: normalised pixel values, as the image processor makes them.
        nio: those of `train` or, for `nio_augment="clean"`, of the same images as in evaluation.
    """

    train: Samples
    evaluation: Samples
    nio: Samples


class ImageTrainer(RecipeTrainer):
    """A [`RecipeTrainer`] of image classifiers.

    Crops, flips and what augments batches on the device have a seed for each sample, which depends on the epoch and the
    sample alone. The loss is the cross-entropy against classes or probabilities, the sum over all
    accumulated samples of all processes divided by their number; label smoothing counts in training only.

    Args:
        model: Model with images as `pixel_values` and `logits` as a result.
        args: Arguments, of which `label_smoothing_factor` is the smoothing.
        data: The samples.
        augmentation: Augmentation of the batches of training.
        nio_augment: Batches of NIO: "clean", "augmented" without mixing, or "mixed" with mixing and label smoothing.
        processing_class: Image processor that is saved with the model.
        extras: What a recipe asks for beside that.

    Raises:
        ConfigError, ModelError: as in [`RecipeTrainer`].
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: NIOTrainingArguments,
        data: ImageTrainingData,
        augmentation: BatchAugmentation,
        nio_augment: NIOAugment,
        processing_class: BaseImageProcessor,
        extras: Extras = Extras(),  # noqa: B008
    ) -> None:
        self._augmentation = augmentation
        self._nio_augment = nio_augment
        self.data = data
        super().__init__(
            model=model,
            args=args,
            extras=extras,
            samples="images",
            data_collator=collate_images,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            processing_class=processing_class,
            compute_loss_func=self._training_loss,
            compute_metrics=classification_metrics,
            preprocess_logits_for_metrics=predictions_and_losses,
        )

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics that an evaluation has beside the loss, see [`classification_metrics`]."""
        classes: int = self.unwrapped_model.config.num_labels  # type: ignore[union-attr,assignment]
        return ("accuracy", f"top{TOP_K}_accuracy") if classes > TOP_K else ("accuracy",)

    @property
    def skipped_images(self) -> int:
        """Images that could not be read and were passed over so far, counted once for each use of the data."""
        parts = {id(part): part for part in (self.data.train, self.data.evaluation, self.data.nio)}
        return sum(part.broken.total for part in parts.values())

    def summary_rows(self) -> list[tuple[str, str, str]]:
        """Images that were passed over."""
        return [("Images skipped, broken", "", str(self.skipped_images))] if self.skipped_images else []

    # NIO

    def get_nio_dataset(self) -> Samples:
        """The samples of NIO."""
        return self.data.nio

    def nio_identity(self) -> dict[str, Any]:
        """How the batches are augmented."""
        return {"augment": self._nio_augment}

    def prepare_nio_batch(self, batch: Any, number: int) -> Any:
        """The batch, augmented on the device unless it is to be clean."""
        if self._nio_augment == "clean":
            return batch
        return self._augmentation(self._prepare_inputs(batch), mix=self._nio_augment == "mixed")

    def compute_nio_loss(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        """The mean cross-entropy; smoothed where batches are "mixed"."""
        batch = self._prepare_inputs(inputs)
        smoothing = self.args.label_smoothing_factor if self._nio_augment == "mixed" else 0.0
        logits = model(pixel_values=batch["pixel_values"].float()).logits
        return classification_loss(logits, batch["labels"], label_smoothing=smoothing)

    # What follows overrides Trainer.

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As in Trainer, on augmented images."""
        return super().training_step(model, self._augmentation(self._prepare_inputs(inputs)), num_items_in_batch)

    def _training_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        training = self.model is not None and self.model.training
        smoothing = self.args.label_smoothing_factor if training else 0.0
        return classification_loss(outputs["logits"], labels, label_smoothing=smoothing, samples=num_items_in_batch)
