"""From RGB images to pixel values, with Pillow, in the workers of a data loader."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from PIL import Image
from torch.nn import functional
from transformers import BaseImageProcessor

from nio_hf.recipe.settings import AugmentationSettings
from nio_hf.vision.processors import image_bytes, pixel_format, resized_bytes

_ATTEMPTS = 10


class EvaluationTransform:
    """Transform of evaluation: the image processor makes float pixel values (channels, height, width) of each image."""

    def __init__(self, processor: BaseImageProcessor) -> None:
        self._processor = processor

    def __call__(self, images: list[Image.Image]) -> list[torch.Tensor]:
        """Pixel values of the images."""
        return list(self._processor(images, return_tensors="pt")["pixel_values"])


class TrainingTransform:
    """Transform of training: a random crop and flip, drawn from Python's `random`, as bytes (channels, height, width).

    Bytes are a quarter of the data on the way to the device, where [`BatchAugmentation`] scales and normalises them.

    Args:
        processor: Image processor, which gives size and filter, and resizes images that are not cropped.
        settings: Settings of crops and flips. `random_crop` is "resized" for a random part of the image, resized;
            "padded" for a random window of the image as the processor resizes it, with zeros around it; "none" for
            the image as the processor resizes it.
    """

    def __init__(self, processor: BaseImageProcessor, settings: AugmentationSettings) -> None:
        self._processor = processor
        self._pixels = pixel_format(processor)
        self._settings = settings

    def __call__(self, images: list[Image.Image]) -> list[torch.Tensor]:
        """Pixel values of the images."""
        if self._settings.random_crop == "resized":
            return [self._resized_part(image) for image in images]
        # A processor that keeps the images would take longer than their decoding.
        size = (self._pixels.width, self._pixels.height)
        if self._pixels.keeps and all(image.size == size and image.mode == "RGB" for image in images):
            pixel_values = [image_bytes(image) for image in images]
        else:
            pixel_values = list(resized_bytes(self._processor, images))
        if self._settings.random_crop == "padded":
            pixel_values = [self._window(pixels) for pixels in pixel_values]
        return [pixels.flip(-1) if self._flips() else pixels for pixels in pixel_values]

    def _flips(self) -> bool:
        return self._settings.horizontal_flip > 0 and random.random() < self._settings.horizontal_flip

    def _resized_part(self, image: Image.Image) -> torch.Tensor:
        box = random_part(image.width, image.height, self._settings.crop_scale, self._settings.crop_aspect)
        part = image.resize((self._pixels.width, self._pixels.height), self._pixels.resample, box=box)
        return image_bytes(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self._flips() else part)

    def _window(self, pixels: torch.Tensor) -> torch.Tensor:
        (_, height, width), padding = pixels.shape, self._settings.crop_padding
        padded = functional.pad(pixels, [padding] * 4)
        top, left = random.randint(0, 2 * padding), random.randint(0, 2 * padding)
        return padded[:, top : top + height, left : left + width]


def random_part(width: int, height: int, scale: Sequence[float], aspect: Sequence[float]) -> tuple[int, int, int, int]:
    """Draw a random part (left, top, right, bottom) of an image, as in Inception training (arXiv 1409.4842).

    After ten draws that do not fit into the image, the part is the largest centred one of an allowed aspect.

    Args:
        width: Width of the image.
        height: Height of the image.
        scale: Range of the area of the part, as a share of the image; uniform.
        aspect: Range of the width / height of the part; log-uniform.
    """
    log_aspect = [math.log(bound) for bound in aspect]
    for _ in range(_ATTEMPTS):
        area = width * height * random.uniform(scale[0], scale[1])
        ratio = math.exp(random.uniform(log_aspect[0], log_aspect[1]))
        part_width, part_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < part_width <= width and 0 < part_height <= height:
            left, top = random.randint(0, width - part_width), random.randint(0, height - part_height)
            return left, top, left + part_width, top + part_height
    ratio = min(max(width / height, aspect[0]), aspect[1])
    part_width, part_height = max(1, min(width, round(height * ratio))), max(1, min(height, round(width / ratio)))
    left, top = (width - part_width) // 2, (height - part_height) // 2
    return left, top, left + part_width, top + part_height
