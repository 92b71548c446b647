"""What training does to a batch of images on its device: from bytes to normalised, augmented pixel values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from kornia.augmentation import ColorJitter, RandomErasing
from torch import Tensor

from nio_hf.vision.mixing import Mixing
from nio_hf.vision.processors import PixelFormat
from nio_hf.vision.rand_augment import RandAugment

_BYTE = 255.0
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = (0.3, 1 / 0.3)


class BatchAugmentation:
    """Scale, RandAugment, colour jitter, normalise, erase and mix, in the order of the published trainings.

    Each draw is one of a sample, those of mixing one of the batch; all come from torch's CPU generator, the noise of
    erased rectangles from that of the device.

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
        self._jitter = ColorJitter(*[color_jitter] * 3) if color_jitter > 0 else None
        self._erasing = RandomErasing(_ERASED_AREA, _ERASED_ASPECT, 1.0, p=random_erasing) if random_erasing else None
        self._mixing = mixing

    def __call__(self, batch: Mapping[str, Any], *, mix: bool = True) -> dict[str, Any]:
        """The batch with its images augmented, and with `mix` its labels mixed.

        Args:
            batch: `pixel_values`, bytes (B, 3, H, W), and `labels` (B,).
            mix: whether to mix, where that is set up.
        """
        images: Tensor = batch["pixel_values"].contiguous().to(torch.float32, copy=True).div_(_BYTE)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            if self._rand_augment is not None:
                images = self._rand_augment(images)
            if self._jitter is not None:
                images = self._jitter(images)
            images.sub_(self._mean.to(images.device)).div_(self._std.to(images.device))
            if self._erasing is not None:
                erased = self._erasing(torch.zeros_like(images[:, :1])) > 0
                images = torch.where(erased, torch.randn_like(images), images)
            labels = batch["labels"]
            if mix and self._mixing is not None:
                images, labels = self._mixing(images, labels)
        return {**batch, "pixel_values": images, "labels": labels}
