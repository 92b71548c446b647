"""The small trainings of this benchmark: models, data, groups of tensors, and one plain loop.

The loop is written out so that a training of 500 steps takes half a minute on one core. Model, data, optimizer and
schedule are those of `benchmarks/warmup_free`; the digits are those of the recipe `vit-tiny/digits/no_warmup`.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

WEIGHT_DECAY = 0.05
EVALUATION_BATCH = 500
PIXELS = 32
"""Width and height of the images of CIFAR-10, which Imagenette is made as large as."""
DIGITS_HELD_OUT = 360
HELD_OUT = 10
"""One of that many training images chooses, instead of the test images."""
MATRIX = 2


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


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model on a data set.

    Attributes:
        data: name of the data set.
        groups: {name of a group: regular expression that the parameter names of its weight matrices contain}.
        wide: groups whose factor is drawn from a wider range.
        block: regular expression of the module names of the residual blocks.
        steps, batch_size: of a training.
        flip: whether images are flipped at random.
    """

    data: str
    groups: Mapping[str, str]
    wide: tuple[str, ...]
    block: str
    steps: int = 500
    batch_size: int = 64
    flip: bool = True


_BLOCKS = {
    "patches": r"patch_embeddings.*weight",
    "query_key": r"(q_proj|k_proj|query|key)\.weight",
    "value": r"(v_proj|value)\.weight",
    "output": r"(o_proj|attention\.output\.dense)\.weight",
    "mlp_in": r"(fc1|intermediate\.dense)\.weight",
    "mlp_out": r"(fc2|(?<!attention\.)output\.dense)\.weight",
}
_HEAD = {"head": r"classifier\.weight"}
# The order of the groups is that in which their factors are drawn.
_VIT_GROUPS = {"positions": r"position_embeddings|cls_token", **_BLOCKS, **_HEAD}
_SWIN_GROUPS = {**_BLOCKS, "reductions": r"reduction\.weight", **_HEAD}
SETUPS = {
    "vit": Setup("cifar10", _VIT_GROUPS, ("positions",), r"layers?\.\d+$"),
    "swin": Setup("cifar10", _SWIN_GROUPS, ("reductions",), r"blocks\.\d+$"),
    "imagenette": Setup("imagenette224", _VIT_GROUPS, ("positions",), r"layers?\.\d+$"),
    "digits": Setup("digits", _VIT_GROUPS, ("positions",), r"layers?\.\d+$", steps=400, flip=False),
}


_DIGITS_VIT = {"image_size": 8, "patch_size": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
_SWIN = {
    "patch_size": 4,
    "embed_dim": 32,
    "depths": [2, 2, 2],
    "num_heads": [1, 2, 4],
    "window_size": 2,
    "drop_path_rate": 0.0,
}
CLASSES, LAYERS, WIDTH = 10, 6, 96
_HEAD_SIZE = 32


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


def grouped_tensors(model: nn.Module, setup: Setup) -> dict[str, list[nn.Parameter]]:
    """The weight matrices of each group; zero tables are in none.

    Raises:
        ValueError: where the groups are no partition of them.
    """
    found: dict[str, list[nn.Parameter]] = {group: [] for group in setup.groups}
    for name, parameter in model.named_parameters():
        owners = [group for group, pattern in setup.groups.items() if re.search(pattern, name)]
        if parameter.ndim < MATRIX or not bool(parameter.detach().any()):
            # A token of zeros stays as it is.
            continue
        if len(owners) != 1:
            raise ValueError(f"{name} is in the groups {owners}")
        found[owners[0]].append(parameter)
    if not all(found.values()):
        raise ValueError(f"a group is empty: {found.keys()}")
    return found


@torch.no_grad()
def scale_groups(model: nn.Module, setup: Setup, scales: Mapping[str, float]) -> None:
    """Multiply the tensors of each group by its scale, in place."""
    for group, tensors in grouped_tensors(model, setup).items():
        for tensor in tensors:
            tensor.mul_(scales[group])


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


Prepare = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]
"""(bytes (B, C, H, W), labels (B,), generator) -> (pixels, labels or shares of classes), as the model is given them."""


def batches(
    images: Images, setup: Setup, seed: int, *, flip: bool, prepare: Prepare | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches in a random order that the seed fixes.

    Args:
        images: to draw from.
        setup: gives the size.
        seed: of the order, and of what is drawn for a batch.
        flip: whether images are flipped at random.
        prepare: makes the batches, in the place of scaling and flips.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images.train), generator=generator)
        for positions in order.split(setup.batch_size):
            if len(positions) < setup.batch_size:
                continue
            if prepare is not None:
                yield prepare(images.train[positions], images.train_labels[positions], generator)
                continue
            pixels = normalised(images.train[positions])
            if flip:
                flipped = torch.rand(len(positions), generator=generator) < 0.5
                pixels[flipped] = pixels[flipped].flip(-1)
            yield pixels, images.train_labels[positions]


def loss_of(model: nn.Module, pixels: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy."""
    logits = model(pixel_values=pixels).logits
    loss: Tensor = nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    return loss


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


@dataclasses.dataclass(frozen=True)
class Ending:
    """What a training ended at.

    Attributes:
        losses: of each step; they end where one is not finite.
        right: whether each test image is told rightly.
        loss: on the test images.
    """

    losses: list[float]
    right: Tensor
    loss: float

    @property
    def accuracy(self) -> float:
        """On the test images, in %."""
        return 100 * float(self.right.float().mean())


def parameter_groups(model: nn.Module, weight_decay: float = WEIGHT_DECAY) -> list[dict[str, object]]:
    """The parameters for an optimizer: weight decay on those of two dimensions and more."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= MATRIX]
    others = [parameter for parameter in model.parameters() if parameter.ndim < MATRIX]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with torch's betas."""
    return torch.optim.AdamW(parameter_groups(model), foreach=True)


def cosine(step: int, steps: int) -> float:
    """Share of the learning rate at a step: from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def descend(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    steps: int,
    learning_rate: float,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int, int], float] = cosine,
    most_norm: float | None = None,
) -> list[float]:
    """The steps of a training; returns their losses, which end where one is not finite.

    Args:
        model: As it starts.
        batches: At least `steps` of them.
        loss: (model, batch) -> mean loss.
        steps: Number of steps.
        learning_rate: Peak.
        optimizer: Its optimizer.
        schedule: (step, steps) -> share of the learning rate.
        most_norm: Norm that gradients are clipped to; None for no clipping.
    """
    losses: list[float] = []
    model.train()
    for step, batch in enumerate(itertools.islice(batches, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, steps)
        mean = loss(model, batch)
        losses.append(float(mean.detach()))
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        mean.backward()
        if most_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), most_norm)
        optimizer.step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return losses


def train(model: nn.Module, setup: Setup, images: Images, *, learning_rate: float, seed: int) -> Ending:
    """Train with AdamW and a cosine schedule, without clipping, and evaluate; the seed orders the data."""
    losses = descend(
        model,
        batches(images, setup, seed, flip=setup.flip),
        lambda own, batch: loss_of(own, *batch),
        steps=setup.steps,
        learning_rate=learning_rate,
        optimizer=adamw(model),
    )
    return Ending(losses, *evaluate(model, images.test, images.test_labels))
