"""What training does to a batch of images on its device: from bytes to normalised, augmented pixel values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nio_hf.vision.mixing import Mixing
from nio_hf.vision.processors import PixelFormat
from nio_hf.vision.rand_augment import ColorJitter, RandAugment
from nio_hf.vision.sample_random import SampleRandom, draw_seed
from nio_hf.vision.samples import SEEDS

_BYTE = 255.0
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = (0.3, 1 / 0.3)


class BatchAugmentation:
    """Scale, RandAugment, colour jitter, normalise, erase and mix, in the order of the published trainings.

    What is drawn for a sample depends on its seed alone, whatever batch and process it is in; what mixing draws for a
    batch, on the seed of its first sample.

    Args:
        pixels: mean and standard deviation of the result.
        rand_augment: None for none.
        color_jitter: strength of random brightness, contrast and saturation.
        random_erasing: probability of filling a rectangle with normal noise (arXiv 1708.04896).
        mixing: None for none.
    """

    def __init__(
        self,
        pixels: PixelFormat,
        *,
        rand_augment: RandAugment | None = None,
        color_jitter: float = 0.0,
        random_erasing: float = 0.0,
        mixing: Mixing | None = None,
    ) -> None:
        self._mean = torch.tensor(pixels.mean)[:, None, None]
        self._std = torch.tensor(pixels.std)[:, None, None]
        self._rand_augment = rand_augment
        self._jitter = ColorJitter(color_jitter) if color_jitter > 0 else None
        self._erasing = random_erasing
        self._mixing = mixing

    @property
    def is_random(self) -> bool:
        """Whether anything is drawn."""
        return any((self._rand_augment, self._jitter, self._erasing, self._mixing))

    def __call__(self, batch: Mapping[str, Any], *, mix: bool = True) -> dict[str, Any]:
        """The batch with its images augmented, and with `mix` its labels mixed.

        Args:
            batch: `pixel_values`, bytes (B, 3, H, W), `labels` (B,), and `seeds` (B,), which the result has no more;
                without them torch's CPU generator draws some.
            mix: whether to mix, where that is set up.
        """
        images: Tensor = batch["pixel_values"].contiguous().to(torch.float32, copy=True).div_(_BYTE)
        labels = batch["labels"]
        others = {key: value for key, value in batch.items() if key != SEEDS}
        random = self._random_of(batch)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            if self._rand_augment is not None:
                images = self._rand_augment(images, random)
            if self._jitter is not None:
                images = self._jitter(images, random)
            images.sub_(self._mean.to(images.device)).div_(self._std.to(images.device))
            if self._erasing:
                _erase(images, self._erasing, random)
            if mix and self._mixing is not None:
                with random.of_batch():
                    images, labels = self._mixing(images, labels)
        return {**others, "pixel_values": images, "labels": labels}

    def _random_of(self, batch: Mapping[str, Any]) -> SampleRandom:
        if not self.is_random:
            return SampleRandom([])
        seeds = batch[SEEDS].tolist() if SEEDS in batch else [draw_seed() for _ in batch["labels"]]
        return SampleRandom(seeds)


def _erase(images: Tensor, probability: float, random: SampleRandom) -> None:
    """Fill a rectangle of some of the images (B, 3, H, W) with normal noise."""
    height, width = images.shape[-2:]
    noise = torch.Generator(images.device)
    for sample, (chosen, area, aspect, top, left) in enumerate(random.uniform(5).tolist()):
        if chosen >= probability:
            continue
        pixels = height * width * _between(_ERASED_AREA, area)
        ratio = math.exp(_between((math.log(_ERASED_ASPECT[0]), math.log(_ERASED_ASPECT[1])), aspect))
        rows = min(max(round(math.sqrt(pixels * ratio)), 1), height)
        columns = min(max(round(math.sqrt(pixels / ratio)), 1), width)
        y, x = int(top * (height - rows + 1)), int(left * (width - columns + 1))
        images[sample, :, y : y + rows, x : x + columns].normal_(generator=noise.manual_seed(random.seed(sample)))


def _between(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + share * (bounds[1] - bounds[0])
