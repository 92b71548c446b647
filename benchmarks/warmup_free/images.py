"""The image trainings of the study."""

from __future__ import annotations

import base64
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ViTConfig

from benchmarks.layer_scales.trainings import (
    CLASSES,
    LAYERS,
    PIXELS,
    SETUPS,
    WEIGHT_DECAY,
    WIDTH,
    Images,
    Setup,
    batches,
    build_model,
    evaluate,
    load_images,
    loss_of,
    scale_groups,
    without_test_images,
)
from nio_hf.recipe.loading import load_recipe
from nio_hf.tasks.image_classification import make_augmentation
from nio_hf.vision.processors import make_image_processor

AUGMENTED = "vit-tiny/cifar10/no_warmup"
"""Recipe whose augmentation and label smoothing long trainings have."""


@dataclasses.dataclass(frozen=True)
class ImageTask:
    """A training on images, as in [`lab.Task`].

    Attributes:
        model: "vit" or "swin".
        data: Name of the data set.
        steps: Budget, initialisation included.
        width: Of the ViT.
        depth: Layers of the ViT.
        batch_size: Images of a step.
        pixels: Width and height of the images.
        augmented: Whether batches are augmented, and labels smoothed, as in the recipe `AUGMENTED`.
    """

    model: str
    data: str = "cifar10"
    steps: int = 500
    width: int = WIDTH
    depth: int = LAYERS
    batch_size: int = 64
    pixels: int = PIXELS
    augmented: bool = False

    weight_decay: ClassVar[float] = WEIGHT_DECAY
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    most_norm: ClassVar[float | None] = None
    failure: ClassVar[dict[str, Any]] = {"accuracy": 100 / CLASSES}

    @property
    def setup(self) -> Setup:
        """Groups of tensors, data and loop of the model."""
        return dataclasses.replace(SETUPS[self.model], data=self.data, steps=self.steps, batch_size=self.batch_size)

    def build(self, seed: int) -> nn.Module:
        """The model as its class draws it."""
        return build_model(self.model, seed, width=self.width, depth=self.depth, pixels=self.pixels)

    def samples(self, data: Path, *, choosing: bool) -> ImageSamples:
        """Its images."""
        images = load_images(self.data, data, self.pixels)
        augmentation = Augmentation() if self.augmented else None
        return ImageSamples(without_test_images(images) if choosing else images, self.setup, augmentation)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy; labels are smoothed where they are shares of classes, as mixing leaves them."""
        pixels, labels = batch
        return loss_of(model, pixels, labels, smoothing() if labels.is_floating_point() else 0.0)

    def scale(self, model: nn.Module, scales: Mapping[str, float]) -> None:
        """Multiply groups of weights, in place."""
        scale_groups(model, self.setup, scales)


@dataclasses.dataclass(frozen=True)
class ImageSamples:
    """Images to train on and to evaluate on."""

    images: Images
    setup: Setup
    augmentation: Augmentation | None

    def batches(self, seed: int, *, plain: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches in an order that the seed fixes; plain ones are flipped at most."""
        prepare = None if plain else self.augmentation
        return batches(self.images, self.setup, seed, flip=self.setup.flip, prepare=prepare)

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """Accuracy in %, loss, and which images are told rightly."""
        right, loss = evaluate(model, self.images.test, self.images.test_labels)
        return {"accuracy": round(100 * float(right.float().mean()), 2), "loss": loss, "right": packed(right)}


@functools.cache
def smoothing() -> float:
    """Label smoothing of the recipe `AUGMENTED`."""
    return load_recipe(AUGMENTED).training.label_smoothing_factor


class Augmentation:
    """The augmentation of the recipe `AUGMENTED`, for batches in memory.

    A window of the image with 4 zeros around it, a flip, RandAugment, erased rectangles, and mixing.
    """

    def __init__(self) -> None:
        settings = load_recipe(AUGMENTED).augmentation
        config = ViTConfig(image_size=PIXELS)
        processor = make_image_processor(config, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        self._padding = settings.crop_padding
        self._augment = make_augmentation(settings, processor, CLASSES)

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(pixels, shares of classes) of a batch of bytes, drawn from a generator."""
        count, side, padding = len(images), images.shape[-1], self._padding
        padded = nn.functional.pad(images, (padding,) * 4)
        places = torch.randint(2 * padding + 1, (count, 2), generator=generator)
        cropped = torch.stack(
            [image[:, y : y + side, x : x + side] for image, (y, x) in zip(padded, places.tolist(), strict=True)]
        )
        flipped = torch.rand(count, generator=generator) < 0.5
        cropped[flipped] = cropped[flipped].flip(-1)
        seeds = torch.randint(2**62, (count,), generator=generator)
        made = self._augment({"pixel_values": cropped, "labels": labels, "seeds": seeds})
        return made["pixel_values"], made["labels"]


def packed(right: Tensor) -> str:
    """Which images are told rightly, a bit for each, as text."""
    return base64.b64encode(np.packbits(right.numpy()).tobytes()).decode()


def unpacked(text: str, images: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Inverse of `packed`: (images,) of 0 and 1."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))[:images]
