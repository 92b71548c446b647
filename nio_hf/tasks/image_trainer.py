"""Trainer of image classifiers, with augmentation on the device and soft labels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from nio_hf.recipe.loading import Recipe
from nio_hf.tasks.trainer import RecipeTrainer
from nio_hf.vision.augmentation import BatchAugmentation
from nio_hf.vision.metrics import TOP_K, classification_loss, classification_metrics, predictions_and_losses
from nio_hf.vision.samples import ImageSamples, ImageStream, collate_images

Samples = ImageSamples | ImageStream


class ImageTrainingData(NamedTuple):
    """Samples of an image classifier.

    Attributes:
        train: Samples to train on, as cropped and flipped bytes.
        evaluation: Samples to evaluate on, as normalised pixel values.
        nio: Samples of NIO, as one or the other.
    """

    train: Samples
    evaluation: Samples
    nio: Samples


class ImageTrainer(RecipeTrainer):
    """A [`RecipeTrainer`] of image classifiers.

    Crops, flips and the augmentation on the device have a seed for each sample, which depends on the epoch and the
    sample alone. The loss is the cross-entropy against classes or probabilities, summed over all accumulated samples of
    all processes and divided by their number; labels are smoothed in training only. Batches of NIO are "clean",
    "augmented" without mixing, or "mixed" with mixing and label smoothing, by the setting `nio_augment`.

    Args:
        recipe: Recipe of the training.
        model: Model from `pixel_values` to `logits`.
        data: Samples of training, evaluation and NIO.
        augmentation: Augmentation of the batches of training.
        processing_class: Image processor that is saved with the model.

    Raises:
        ConfigError, ModelError: Settings as in [`RecipeTrainer`].
    """

    def __init__(
        self,
        *,
        recipe: Recipe,
        model: PreTrainedModel,
        data: ImageTrainingData,
        augmentation: BatchAugmentation,
        processing_class: BaseImageProcessor,
    ) -> None:
        self._augmentation = augmentation
        self._nio_augment = recipe.augmentation.nio_augment
        self.data = data
        super().__init__(
            recipe=recipe,
            model=model,
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
        """Names of the metrics beside the loss, as in [`classification_metrics`]."""
        classes: int = self.unwrapped_model.config.num_labels  # type: ignore[union-attr,assignment]
        return ("accuracy", f"top{TOP_K}_accuracy") if classes > TOP_K else ("accuracy",)

    def summary_rows(self) -> list[tuple[str, str, str]]:
        """Row with the number of skipped images, counted once for each use of the data."""
        parts = {id(part): part for part in (self.data.train, self.data.evaluation, self.data.nio)}
        skipped = sum(part.skipped for part in parts.values())
        return [("Images skipped, broken", "", str(skipped))] if skipped else []

    # NIO

    def get_nio_dataset(self) -> Samples:
        """Samples of NIO."""
        return self.data.nio

    def nio_identity(self) -> dict[str, Any]:
        """Setting by which batches of NIO are augmented."""
        return {"augment": self._nio_augment}

    def prepare_nio_batch(self, batch: Any, number: int) -> Any:
        """Augment a batch on the device, unless batches of NIO are "clean"."""
        if self._nio_augment == "clean":
            return batch
        return self._augmentation(self._prepare_inputs(batch), mix=self._nio_augment == "mixed")

    def compute_nio_loss(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        """Mean cross-entropy, with label smoothing where batches are "mixed"."""
        batch = self._prepare_inputs(inputs)
        smoothing = self.args.label_smoothing_factor if self._nio_augment == "mixed" else 0.0
        logits = model(pixel_values=batch["pixel_values"].float()).logits
        return classification_loss(logits, batch["labels"], label_smoothing=smoothing)

    # Overrides of Trainer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Take a step as in Trainer, on augmented images."""
        return super().training_step(model, self._augmentation(self._prepare_inputs(inputs)), num_items_in_batch)

    def _training_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        training = self.model is not None and self.model.training
        smoothing = self.args.label_smoothing_factor if training else 0.0
        return classification_loss(outputs["logits"], labels, label_smoothing=smoothing, samples=num_items_in_batch)
