"""One training of the study: a model, how it is initialised, its optimizer, and what came of it.

The loop is the plain one of `benchmarks.layer_scales.trainings`, which reads the images once; the initialisations are
those of the package. A run has a budget of training steps, from which its initialisation is paid.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import schedulefree
import torch
from torch import Tensor, nn
from transformers import ViTConfig

from benchmarks.layer_scales.trainings import (
    CLASSES,
    LAYERS,
    PIXELS,
    SETUPS,
    WIDTH,
    Setup,
    adamw,
    batches,
    build_model,
    cosine,
    load_images,
    loss_of,
    parameter_groups,
    scale_groups,
    train,
    without_test_images,
)
from nio_hf import NIOConfig, initialize
from nio_hf.core import NIO, squared_gradients
from nio_hf.core.groups import kinds_of
from nio_hf.recipe.loading import load_recipe
from nio_hf.tasks.image_classification import make_augmentation
from nio_hf.trainer.methods import METHODS
from nio_hf.trainer.seeding import seed_second_moment
from nio_hf.training.muon import MuonAndAdamW
from nio_hf.vision.processors import make_image_processor

RESULTS = Path(__file__).parent.parent / "results" / "warmup-free"
SEARCHED = RESULTS / "searched.json"
"""{model: {group: scale}} that the direct search has found."""
AUGMENTED = "vit-tiny/cifar10/no_warmup"
"""Recipe whose augmentation and label smoothing long trainings have."""
WINDOWS = 20
"""Parts of a training whose mean loss is kept."""
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Task:
    """A training that arms share.

    Attributes:
        model: "vit" or "swin".
        data: name of the data set.
        steps: budget, initialisation included.
        width: of the ViT.
        depth: layers of the ViT.
        batch_size: of a step.
        pixels: width and height of the images.
        augmented: whether batches are augmented, and labels smoothed, as in the recipe `AUGMENTED`.
    """

    model: str
    data: str = "cifar10"
    steps: int = 500
    width: int = WIDTH
    depth: int = LAYERS
    batch_size: int = 64
    pixels: int = PIXELS
    augmented: bool = False

    @property
    def setup(self) -> Setup:
        """Groups of tensors, data and loop of the model."""
        return dataclasses.replace(SETUPS[self.model], data=self.data, steps=self.steps, batch_size=self.batch_size)

    def build(self, seed: int) -> nn.Module:
        """The model as its class draws it."""
        return build_model(self.model, seed, width=self.width, depth=self.depth, pixels=self.pixels)


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is compared: an initialisation and an optimizer.

    Attributes:
        draws: (method, its options), one after the other; none for the class's own.
        optimizer: "adamw", "radam", "schedule_free" or "muon".
        warmup: share of the steps with a linear warmup.
        seeded: whether Adam's second moment is seeded (GI-Adam).
        searched: whether groups are scaled as the direct search found.
        published: whether NIO has the settings of its paper, in the place of the defaults.
        rates: learning rates that are tried first.
    """

    draws: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    optimizer: str = "adamw"
    warmup: float = 0.0
    seeded: bool = False
    searched: bool = False
    published: bool = False
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)


_HIGHER = (1e-3, 2e-3, 4e-3)
_NIO = ("nio", {})
ARMS = {
    "class": Arm(),
    "warmup10": Arm(warmup=0.1),
    "warmup30": Arm(warmup=0.3),
    "x2": Arm((("range", {"factor": 2.0}),)),
    "x4": Arm((("range", {"factor": 4.0}),)),
    "width": Arm((("range", {}),)),
    "xavier": Arm((("xavier", {}),)),
    "mimetic": Arm((("mimetic", {}),)),
    "structured": Arm((("structured", {}),)),
    "lsuv": Arm((("lsuv", {}),)),
    "positions8": Arm((("range", {"factor": 4.0, "additive": 8.0}),)),
    "positions32": Arm((("range", {"factor": 4.0, "additive": 32.0}),)),
    "searched": Arm(searched=True),
    "gi_adam": Arm(seeded=True, rates=_HIGHER),
    "radam": Arm(optimizer="radam", rates=_HIGHER),
    "schedule_free": Arm(optimizer="schedule_free", rates=_HIGHER),
    "muon": Arm(optimizer="muon", rates=_HIGHER),
    "nio": Arm((_NIO,)),
    "nio_warmup10": Arm((_NIO,), warmup=0.1),
    "nio_seeded": Arm((_NIO,), seeded=True, rates=_HIGHER),
    "nio_muon": Arm((_NIO,), optimizer="muon", rates=_HIGHER),
    "published": Arm((_NIO,), published=True),
    "xavier_nio": Arm((("xavier", {}), _NIO)),
    "mimetic_nio": Arm((("mimetic", {}), _NIO)),
}
"""{name: arm}."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        task: name of the part of the study.
        arm: its name.
        learning_rate: peak.
        seed: of weights and order of the data.
        choosing: whether it chooses the learning rate, on images that are set aside from the training.
    """

    task: str
    arm: str
    learning_rate: float
    seed: int
    choosing: bool


def carry_out(run: Run, task: Task, data: Path) -> Row:
    """Initialise, train for what is left of the budget, and evaluate."""
    started, arm, setup = time.perf_counter(), ARMS[run.arm], task.setup
    images = load_images(task.data, data, task.pixels)
    if run.choosing:
        images = without_test_images(images)
    model = task.build(run.seed)
    config = NIOConfig.published(seed=run.seed) if arm.published else NIOConfig(seed=run.seed)
    count = config.report_batches + config.batches
    drawn = list(itertools.islice(batches(images, setup, run.seed, flip=setup.flip), count))
    found: Row = {}
    cost = 0.0
    if arm.searched:
        scale_groups(model, setup, json.loads(SEARCHED.read_text(encoding="utf-8"))[task.model])
    for name, options in arm.draws:
        method = METHODS[name]
        result = initialize(model, drawn, batch_loss, config, method=method, options=options)
        if method.batches(config, method.checked(options)):
            cost += result.cost
        if method is NIO:
            found = {"scales": {group.name: _short(group.omega) for group in result.groups}, "status": result.status}
    squares = None
    if arm.seeded:
        reported = drawn[: config.report_batches]
        squares = squared_gradients(model, reported, batch_loss, config, training_batch_size=task.batch_size)
        cost += len(reported)
    optimizer = _optimizer(arm, model, run.learning_rate, squares)
    augmentation = Augmentation() if task.augmented else None
    paid = dataclasses.replace(setup, steps=setup.steps - math.ceil(cost))
    ended = train(
        model,
        paid,
        images,
        learning_rate=run.learning_rate,
        seed=run.seed,
        optimizer=optimizer,
        schedule=_schedule(arm),
        prepare=augmentation,
        smoothing=0.0 if augmentation is None else augmentation.smoothing,
    )
    failed = len(ended.losses) < paid.steps or not math.isfinite(ended.losses[-1])
    judged = {} if run.choosing else {"right": packed(ended.right)}
    return {
        **dataclasses.asdict(run),
        **found,
        "cost": _short(cost),
        "steps": len(ended.losses),
        "accuracy": 100 / CLASSES if failed else round(ended.accuracy, 2),
        "failed": failed,
        "loss": _short(ended.loss) if math.isfinite(ended.loss) else None,
        "losses": _curve(ended.losses),
        "seconds": round(time.perf_counter() - started, 1),
        **judged,
    }


def carry_out_scaled(task: Task, exponents: Mapping[str, float], learning_rate: float, seed: int, data: Path) -> Row:
    """Train with groups scaled by powers of 2, and evaluate on images that are set aside."""
    setup, images = task.setup, without_test_images(load_images(task.data, data, task.pixels))
    model = task.build(seed)
    scale_groups(model, setup, {group: 2.0**exponent for group, exponent in exponents.items()})
    ended = train(model, setup, images, learning_rate=learning_rate, seed=seed)
    found = {"accuracy": round(ended.accuracy, 2), "loss": _short(ended.loss), "losses": _curve(ended.losses)}
    return {"exponents": dict(exponents), "seed": seed, "learning_rate": learning_rate, **found}


def packed(right: Tensor) -> str:
    """Which images are told rightly, a bit for each, as text."""
    return base64.b64encode(np.packbits(right.numpy()).tobytes()).decode()


def unpacked(text: str, images: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Inverse of `packed`: (images,) of 0 and 1."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))[:images]


class Augmentation:
    """The augmentation of the recipe `AUGMENTED`, for batches in memory.

    A window of the image with 4 zeros around it, a flip, RandAugment, erased rectangles, and mixing.

    Attributes:
        smoothing: of the labels, which the loss is to apply.
    """

    def __init__(self) -> None:
        recipe = load_recipe(AUGMENTED)
        settings = recipe.augmentation
        self.smoothing = recipe.training.label_smoothing_factor
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


def batch_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of a batch."""
    return loss_of(model, *batch)


def _optimizer(
    arm: Arm, model: nn.Module, learning_rate: float, squares: Mapping[str, Tensor] | None
) -> torch.optim.Optimizer:
    groups = parameter_groups(model)
    match arm.optimizer:
        case "radam":
            return torch.optim.RAdam(groups, decoupled_weight_decay=True, foreach=True)
        case "schedule_free":
            free = schedulefree.RAdamScheduleFree(groups, lr=learning_rate)
            free.train()
            return free
        case "muon":
            kinds = kinds_of(model)
            matrices = [weight for name, weight in model.named_parameters() if kinds[name] == "trunk"]
            return MuonAndAdamW(groups, matrices=[weight for weight in matrices if weight.ndim == 2], lr=learning_rate)
    optimizer = adamw(model)
    if squares is not None:
        seed_second_moment(optimizer, model, squares, "gi_adam")
    return optimizer


def _schedule(arm: Arm) -> Callable[[int, int], float]:
    """(step, steps) -> share of the learning rate: linear warmup, then cosine; constant where schedule-free."""

    def share(step: int, steps: int) -> float:
        if arm.optimizer == "schedule_free":
            return 1.0
        rising = round(arm.warmup * steps)
        return step / rising if step < rising else cosine(step - rising, steps - rising)

    return share


def _curve(losses: list[float]) -> list[float | None]:
    """Mean losses of equal parts of the training."""
    bounds = [len(losses) * number // WINDOWS for number in range(WINDOWS + 1)]
    windows = [losses[start:end] for start, end in itertools.pairwise(bounds) if end > start]
    means = [sum(window) / len(window) for window in windows]
    return [_short(mean) if math.isfinite(mean) else None for mean in means]


def _short(value: float) -> float:
    return float(f"{value:.5g}")
