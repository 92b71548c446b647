"""The image trainings of the study."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from nio_hf.recipe.loading import load_recipe
from nio_hf.vision.augmentation import BatchAugmentation
from nio_hf.vision.processors import make_image_processor, pixel_format

CLASSES, LAYERS, WIDTH, PIXELS = 10, 6, 96, 32
EVALUATION_BATCH = 500
DIGITS_HELD_OUT = 360
HELD_OUT = 10
"""One of that many training images chooses, instead of the test images."""
AUGMENTED = "vit-tiny/cifar10/no_warmup"
"""Recipe whose augmentation and label smoothing long trainings have."""
_BLOCKS = {
    "patches": r"patch_embeddings.*weight",
    "query_key": r"(q_proj|k_proj|query|key)\.weight",
    "value": r"(v_proj|value)\.weight",
    "output": r"(o_proj|attention\.output\.dense)\.weight",
    "mlp_in": r"(fc1|intermediate\.dense)\.weight",
    "mlp_out": r"(fc2|(?<!attention\.)output\.dense)\.weight",
}
_HEAD = {"head": r"classifier\.weight"}
_VIT_GROUPS = {"positions": r"position_embeddings|cls_token", **_BLOCKS, **_HEAD}
GROUPS: dict[str, dict[str, str]] = {
    "vit": _VIT_GROUPS,
    "swin": {**_BLOCKS, "reductions": r"reduction\.weight", **_HEAD},
    "digits": _VIT_GROUPS,
}
"""{model: {group of weight matrices: regular expression that their names contain}}."""
_HEAD_SIZE = 32
_DIGITS_VIT = {"image_size": 8, "patch_size": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
_SWIN = {
    "patch_size": 4,
    "embed_dim": 32,
    "depths": [2, 2, 2],
    "num_heads": [1, 2, 4],
    "window_size": 2,
    "drop_path_rate": 0.0,
}


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

    weight_decay: ClassVar[float] = 0.05
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    most_norm: ClassVar[float | None] = None
    failure: ClassVar[dict[str, Any]] = {"accuracy": 100 / CLASSES}

    def build(self, seed: int) -> nn.Module:
        """The model as its class draws it."""
        return build_model(self.model, seed, width=self.width, depth=self.depth, pixels=self.pixels)

    def samples(self, data: Path, *, choosing: bool) -> ImageSamples:
        """Its images."""
        images = load_images(self.data, data, self.pixels)
        return ImageSamples(without_test_images(images) if choosing else images, self)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy; labels are smoothed where they are shares of classes, as mixing leaves them."""
        pixels, labels = batch
        own_smoothing = smoothing() if labels.is_floating_point() else 0.0
        logits = model(pixel_values=pixels).logits
        loss: Tensor = nn.functional.cross_entropy(logits, labels, label_smoothing=own_smoothing)
        return loss

    @property
    def groups(self) -> Mapping[str, str]:
        """The groups that a direct search scales."""
        return GROUPS[self.model]


@dataclasses.dataclass(frozen=True)
class ImageSamples:
    """Images to train on and to evaluate on."""

    images: Images
    task: ImageTask

    def batches(self, seed: int, *, plain: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches in an order that the seed fixes; plain ones are flipped at most."""
        augment = Augmentation() if self.task.augmented and not plain else None
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.images.train), generator=generator)
            for places in order.split(self.task.batch_size):
                if len(places) < self.task.batch_size:
                    continue
                drawn, labels = self.images.train[places], self.images.train_labels[places]
                if augment is not None:
                    yield augment(drawn, labels, generator)
                    continue
                pixels = normalised(drawn)
                if self.task.data != "digits":
                    flipped = torch.rand(len(places), generator=generator) < 0.5
                    pixels[flipped] = pixels[flipped].flip(-1)
                yield pixels, labels

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """Accuracy in %, loss, and which images are told rightly."""
        right, loss = evaluate(model, self.images.test, self.images.test_labels)
        return {"accuracy": round(100 * float(right.float().mean()), 2), "loss": loss, "right": packed(right)}


@dataclasses.dataclass(frozen=True)
class Images:
    """A data set in memory.

    Attributes:
        train: (N, C, H, W) bytes.
        train_labels: (N,).
        test: (M, C, H, W) bytes.
        test_labels: (M,).
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


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
        self._augment = BatchAugmentation(pixel_format(processor), settings, CLASSES)

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


def build_model(name: str, seed: int, *, width: int = WIDTH, depth: int = LAYERS, pixels: int = PIXELS) -> nn.Module:
    """A model as its class draws it; width and depth are those of the ViT."""
    torch.manual_seed(seed)
    if name == "swin":
        return SwinForImageClassification(SwinConfig(**_SWIN, image_size=pixels, num_labels=CLASSES))
    sizes = _DIGITS_VIT if name == "digits" else _vit_sizes(width, pixels)
    return ViTForImageClassification(ViTConfig(**sizes, num_hidden_layers=depth, num_labels=CLASSES))


def _vit_sizes(width: int, pixels: int) -> dict[str, int]:
    heads = {"num_attention_heads": width // _HEAD_SIZE, "intermediate_size": 4 * width}
    return {"image_size": pixels, "patch_size": 8, "hidden_size": width, **heads}


@functools.cache
def load_images(name: str, data: Path, pixels: int = PIXELS) -> Images:
    """A data set, decoded once in a process; its photos are made `pixels` wide and high."""
    if name == "digits":
        digits = load_digits()
        images = torch.from_numpy((digits.images * 255 / 16).round().astype(np.uint8))[:, None].expand(-1, 3, -1, -1)
        labels = torch.from_numpy(digits.target)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        train, test = order[DIGITS_HELD_OUT:], order[:DIGITS_HELD_OUT]
        return Images(images[train], labels[train], images[test], labels[test])
    splits = ("train", "test") if name == "cifar10" else ("train", "validation")
    parts = [_decoded(data / name / f"{split}.parquet", pixels) for split in splits]
    return Images(*parts[0], *parts[1])


def _decoded(file: Path, pixels: int) -> tuple[Tensor, Tensor]:
    table = parquet.read_table(file)
    opened = (Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in table.column("image").to_pylist())
    images = [np.asarray(image.resize((pixels, pixels), Image.Resampling.BICUBIC)) for image in opened]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(
        table.column("label").to_pylist()
    )


def without_test_images(images: Images) -> Images:
    """A tenth of the training images in the place of the test images, to choose by."""
    first = len(images.train) // HELD_OUT
    return Images(images.train[first:], images.train_labels[first:], images.train[:first], images.train_labels[:first])


def normalised(images: Tensor) -> Tensor:
    """Pixels in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


@torch.no_grad()
def evaluate(model: nn.Module, pixels: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """(whether each image is told rightly, mean loss)."""
    model.eval()
    right, total = [], 0.0
    parts = zip(pixels.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True)
    for part, part_labels in parts:
        logits = model(pixel_values=normalised(part)).logits
        right.append(logits.argmax(-1) == part_labels)
        total += float(nn.functional.cross_entropy(logits, part_labels, reduction="sum"))
    model.train()
    return torch.cat(right), total / len(labels)
