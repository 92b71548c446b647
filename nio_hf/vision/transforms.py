"""From RGB images to pixel values, with Pillow: what a worker of a data loader does."""

from __future__ import annotations

import math
import random

import torch
from PIL import Image
from torch.nn import functional
from transformers import BaseImageProcessor

from nio_hf.vision.processors import image_bytes, pixel_format, resized_bytes

_ATTEMPTS = 10


class EvaluationTransform:
    """What the image processor makes of images: n times float pixel values (channels, height, width)."""

    def __init__(self, processor: BaseImageProcessor) -> None:
        self._processor = processor

    def __call__(self, images: list[Image.Image]) -> list[torch.Tensor]:
        """Pixel values of n images."""
        return list(self._processor(images, return_tensors="pt")["pixel_values"])


class TrainingTransform:
    """A random crop and flip, drawn from Python's `random`: n times bytes (channels, height, width).

    They are left as bytes for [`BatchAugmentation`], which scales and normalises them on the training device: that
    is a quarter of the data from worker to device.

    Args:
        processor: resizes images that are not cropped, and says to what size and with which filter.
        crop: "resized": a random part of the image, resized. "padded": zeros around the image as the processor resizes
            it, and a random window of that. "none": the image as the processor resizes it.
        scale: for "resized", range of the part's area as a share of the image.
        aspect: for "resized", range of its width / height.
        padding: for "padded", pixels on each side.
        flip: probability of a horizontal flip.
    """

    def __init__(
        self,
        processor: BaseImageProcessor,
        *,
        crop: str,
        scale: tuple[float, float] = (0.08, 1.0),
        aspect: tuple[float, float] = (3 / 4, 4 / 3),
        padding: int = 4,
        flip: float = 0.0,
    ) -> None:
        self._processor = processor
        self._pixels = pixel_format(processor)
        self._crop = crop
        self._scale = scale
        self._aspect = aspect
        self._padding = padding
        self._flip = flip

    def __call__(self, images: list[Image.Image]) -> list[torch.Tensor]:
        """Pixel values of n images."""
        if self._crop == "resized":
            return [self._resized_part(image) for image in images]
        pixel_values = self._resized(images)
        if self._crop == "padded":
            pixel_values = [self._window(pixels) for pixels in pixel_values]
        return [pixels.flip(-1) if self._flips() else pixels for pixels in pixel_values]

    def _resized(self, images: list[Image.Image]) -> list[torch.Tensor]:
        """As the processor resizes images. For those of its size it is not asked: that takes longer than decoding."""
        size = (self._pixels.width, self._pixels.height)
        if self._pixels.keeps and all(image.size == size and image.mode == "RGB" for image in images):
            return [image_bytes(image) for image in images]
        return list(resized_bytes(self._processor, images))

    def _flips(self) -> bool:
        return self._flip > 0 and random.random() < self._flip

    def _resized_part(self, image: Image.Image) -> torch.Tensor:
        box = random_part(image.width, image.height, self._scale, self._aspect)
        part = image.resize((self._pixels.width, self._pixels.height), self._pixels.resample, box=box)
        if self._flips():
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image_bytes(part)

    def _window(self, pixels: torch.Tensor) -> torch.Tensor:
        _, height, width = pixels.shape
        padded = functional.pad(pixels, [self._padding] * 4)
        top, left = random.randint(0, 2 * self._padding), random.randint(0, 2 * self._padding)
        return padded[:, top : top + height, left : left + width]


def random_part(
    width: int, height: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> tuple[int, int, int, int]:
    """A random part (left, top, right, bottom) of an image, as Inception training draws it (arXiv 1409.4842).

    Where ten draws do not fit into the image, it is the largest centred part of an allowed aspect.

    Args:
        width: of the image.
        height: of the image.
        scale: range of the part's area, as a share of the image; uniform.
        aspect: range of its width / height; log-uniform.
    """
    log_aspect = [math.log(bound) for bound in aspect]
    for _ in range(_ATTEMPTS):
        area = width * height * random.uniform(*scale)
        ratio = math.exp(random.uniform(*log_aspect))
        part_width, part_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < part_width <= width and 0 < part_height <= height:
            left, top = random.randint(0, width - part_width), random.randint(0, height - part_height)
            return left, top, left + part_width, top + part_height
    ratio = min(max(width / height, aspect[0]), aspect[1])
    part_width, part_height = max(1, min(width, round(height * ratio))), max(1, min(height, round(width / ratio)))
    left, top = (width - part_width) // 2, (height - part_height) // 2
    return left, top, left + part_width, top + part_height
