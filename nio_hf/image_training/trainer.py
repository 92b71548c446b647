"""`ImageTrainer`: the Trainer of image classifiers, with augmentation on the device and soft labels."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler
from transformers import BaseImageProcessor, PreTrainedModel

from nio_hf.errors import ConfigError, DataError, Problem
from nio_hf.files import output_errors
from nio_hf.image_training.ema import EMACallback
from nio_hf.image_training.muon import MuonAndAdamW
from nio_hf.image_training.weight_decay import decayed_parameters
from nio_hf.report.run import Facts
from nio_hf.trainer import NIOTrainer, NIOTrainingArguments
from nio_hf.trainer.arguments import order_seed
from nio_hf.trainer.sampling import EpochSampler, SeededDataset, SeededStream
from nio_hf.vision.augmentation import BatchAugmentation
from nio_hf.vision.losses import classification_loss
from nio_hf.vision.metrics import TOP_K, classification_metrics, predictions_and_losses
from nio_hf.vision.samples import ImageSamples, ImageStream, collate_images

logger = logging.getLogger(__name__)

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


@dataclasses.dataclass(frozen=True)
class Source:
    """What a training is made from, by the names of [`Facts`].

    Attributes:
        recipe: name of the recipe.
        recipe_text: the recipe as YAML, with the overrides of the run.
        dataset: name of the data set, as it is loaded.
        dataset_config: its configuration.
        dataset_split: that is evaluated on.
    """

    recipe: str
    recipe_text: str
    dataset: str
    dataset_config: str | None = None
    dataset_split: str | None = None


class ImageTrainer(NIOTrainer):
    """A [`NIOTrainer`] of image classifiers.

    Crops, flips and what augments batches on the device have a seed for each sample, which depends on the epoch and the
    sample alone. The loss is the cross-entropy against classes or probabilities, the sum over all
    accumulated samples of all processes divided by their number; label smoothing counts in training only.

    Args:
        model: with images as `pixel_values` and `logits` as a result.
        args: `label_smoothing_factor` is the smoothing.
        data: the samples.
        augmentation: of batches of training.
        nio_augment: batches of NIO: "clean", "augmented" without mixing, or "mixed" with mixing and label smoothing.
        processing_class: image processor that is saved with the model.
        no_weight_decay: parameters without weight decay, see [`decayed_parameters`]; None for Trainer's choice.
        repeats: times that an epoch draws each of its samples.
        source: what the training is made from, saved with the model.
        optimizer: class and arguments of the optimizer; None for what `args.optim` says.
        ema_decay: of the average of the weights that `evaluate_average` evaluates; None for no average.

    Raises:
        ConfigError: for an average, or Muon, of weights that are sharded over devices.
        ModelError: for a name in `no_weight_decay` that no parameter has.
    """

    args: NIOTrainingArguments

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: NIOTrainingArguments,
        data: ImageTrainingData,
        augmentation: BatchAugmentation,
        nio_augment: NIOAugment,
        processing_class: BaseImageProcessor,
        no_weight_decay: list[str] | None = None,
        repeats: int = 1,
        source: Source | None = None,
        optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        ema_decay: float | None = None,
    ) -> None:
        self._augmentation = augmentation
        self._nio_augment = nio_augment
        self._no_weight_decay = no_weight_decay
        self._repeats = repeats
        self._source = source
        self.data = data
        super().__init__(
            model=model,
            args=args,
            data_collator=collate_images,
            train_dataset=_seeded(data.train, order_seed(args)),
            eval_dataset=data.evaluation,
            processing_class=processing_class,
            compute_loss_func=self._training_loss,
            compute_metrics=classification_metrics,
            preprocess_logits_for_metrics=predictions_and_losses,
            optimizer_cls_and_kwargs=optimizer,
        )
        self._warn_of_short_epochs()
        self.get_decay_parameter_names(model)
        self._ema = None if ema_decay is None else EMACallback(self, ema_decay)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            is_muon = optimizer is not None and optimizer[0] is MuonAndAdamW
            for name, given in (("ema_decay", ema_decay), ("optimizer", "muon" if is_muon else None)):
                if given is not None:
                    found = f"{given} with weights that are sharded over devices"
                    raise ConfigError(Problem(name, found, "Leave it out, or train with plain data parallelism"))
        if self._ema is not None:
            self.add_callback(self._ema)

    def _warn_of_short_epochs(self) -> None:
        """Say that an epoch is one step, as recipes for larger data sets make it."""
        size = self.get_total_train_batch_size(self.args)
        if self.args.max_steps > 0 or isinstance(self.data.train, ImageStream) or len(self.data.train) > size:
            return
        self._tell(
            logger,
            "An epoch is one step: %d images for batches of %d. Lower the batch size (global_batch_size), or train for "
            "more epochs.",
            len(self.data.train),
            size,
            level=logging.WARNING,
        )

    @property
    def recipe_text(self) -> str | None:
        """The recipe as YAML."""
        return None if self._source is None else self._source.recipe_text

    def run_facts(self) -> Facts:
        """As in [`NIOTrainer`], with recipe and data set."""
        facts = super().run_facts()
        if self._source is None:
            return facts
        known = {name: value for name, value in vars(self._source).items() if name != "recipe_text"}
        return dataclasses.replace(facts, **known)

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

    def evaluate_average(self, directory: Path) -> dict[str, float]:
        """Evaluate the average of the weights, as `eval_ema_*`, and save it; nothing where there is none.

        Args:
            directory: where the model with its averaged weights is saved.
        """
        if self._ema is None:
            return {}
        with self._ema.swapped_in():
            metrics: dict[str, float] = self.evaluate(metric_key_prefix="eval_ema")
            if self.args.should_save:
                model: Any = self.unwrapped_model
                with output_errors(directory):
                    model.save_pretrained(directory)
                    if self.processing_class is not None:
                        self.processing_class.save_pretrained(directory)
        return metrics

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

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in Trainer.

        Raises:
            DataError: for a data set without samples, and one whose samples fill no batch.
        """
        loader: DataLoader[Any] = super().get_train_dataloader()
        if not isinstance(self.data.train, ImageStream) and len(loader) == 0:
            found = f"true, and {len(self.data.train)} images fill no batch of {self.args.train_batch_size}"
            raise DataError(
                Problem("dataloader_drop_last", found, "Leave it out, or lower per_device_train_batch_size")
            )
        return loader

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters with weight decay."""
        if self._no_weight_decay is None:
            names: list[str] = super().get_decay_parameter_names(model)
            return names
        return decayed_parameters(model, self._no_weight_decay)

    def _training_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        training = self.model is not None and self.model.training
        smoothing = self.args.label_smoothing_factor if training else 0.0
        return classification_loss(outputs["logits"], labels, label_smoothing=smoothing, samples=num_items_in_batch)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        if isinstance(self.data.train, ImageStream):
            return None
        return EpochSampler(len(self.data.train), order_seed(self.args), self._repeats)


def _seeded(samples: Samples, seed: int) -> SeededStream | SeededDataset:
    if isinstance(samples, ImageStream):
        return SeededStream(samples, seed, endless=True)
    return SeededDataset(samples, seed)
