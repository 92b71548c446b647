"""From RGB images to pixel values, with Pillow: image processors, and the transforms of training and evaluation."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn import functional
from transformers import BaseImageProcessor, PreTrainedConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from nio_hf.errors import ModelError, Problem
from nio_hf.recipe.settings import AugmentationSettings

_BYTE = 255
_PROBES = ((60, 40), (40, 60), (500, 400))
_TOLERANCE = 1e-3
_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class PixelFormat:
    """Format of the images that an image processor makes.

    Attributes:
        height: Height in pixels.
        width: Width in pixels.
        mean: Mean of each channel, over pixels in [0, 1].
        std: Standard deviation of each channel, likewise.
        resample: Pillow's filter of resizing.
        keeps: Whether images of that height and width stay as they are.
    """

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Image.Resampling
    keeps: bool


def make_image_processor(
    config: PreTrainedConfig,
    *,
    image_size: int | None = None,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    interpolation: str | None = None,
    crop_ratio: float | None = None,
) -> BaseImageProcessor:
    """Make the image processor of an architecture, on Pillow. None stands for the published value.

    Args:
        config: Configuration of the model, whose image size is used where it has one.
        image_size: Image size for a configuration without one.
        image_mean: Mean of each channel over pixels in [0, 1].
        image_std: Standard deviation of each channel, likewise.
        interpolation: Filter of resizing, "bilinear" or "bicubic".
        crop_ratio: Part of the shorter side that is kept: the side is resized to image_size / crop_ratio, and the
            centre is cropped. None for the published way, with its ratio of resize to crop.

    Raises:
        ModelError: Architecture without an image processor.
    """
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(config.model_type, {})
    make: Any = getattr(transformers, names["pil"]) if "pil" in names else None
    published: Any = make and make()
    if not make or not published.size:
        found = "has no image processor on Pillow" if not make else "has an image processor that resizes to no size"
        raise ModelError(Problem("model_type", f"{config.model_type!r} {found}", "Choose another architecture"))
    resample = None if interpolation is None else Image.Resampling[interpolation.upper()]
    given: dict[str, Any] = {"image_mean": image_mean, "image_std": image_std, "resample": resample}
    given = {key: value for key, value in given.items() if value is not None}
    size = getattr(config, "image_size", None) or image_size
    resized, cropped = _sides(published.size), _sides(getattr(published, "crop_size", None))
    if size is None and crop_ratio is not None:
        size = max((cropped or resized).values())
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        given["crop_size"] = {"height": height, "width": width}
        if crop_ratio is not None:
            make = BitImageProcessorPil
            given = {key: getattr(published, key) for key in ("image_mean", "image_std", "resample")} | given
            given["size"] = {"shortest_edge": round(max(height, width) / crop_ratio)}
        else:
            crops = getattr(published, "do_center_crop", False)
            wanted = {"height": height, "width": width, "shortest_edge": min(height, width)}
            # In the ratio that the published size has to its crop.
            kept = cropped if crops else resized
            kept = {key: kept.get(key, max(kept.values())) for key in resized}
            given["size"] = {key: round(wanted[key] * side / kept[key]) for key, side in resized.items()}
            if not crops:
                del given["crop_size"]
    return cast(BaseImageProcessor, make(**given))


def _sides(size: Any) -> dict[str, int]:
    return {key: value for key, value in dict(size or {}).items() if value}


def image_bytes(image: Image.Image) -> torch.Tensor:
    """Bytes (channels, height, width) of an image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resized_bytes(processor: BaseImageProcessor, images: list[Image.Image]) -> torch.Tensor:
    """Bytes (n, channels, height, width) of images as a processor resizes and crops them, before it scales them."""
    described: Any = processor
    made: torch.Tensor = described(images, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    return made.round().clamp(0, _BYTE).to(torch.uint8)


def pixel_format(processor: BaseImageProcessor) -> PixelFormat:
    """Find the format of the images that an image processor makes, by trying images of several shapes.

    Raises:
        ModelError: Processor that does not make (resized bytes / 255 - mean) / std of one size of all images, so that
            they cannot be augmented.
    """
    described: Any = processor
    found = f"{type(processor).__name__} with size {_sides(getattr(described, 'size', None))} does not make normalised "
    fix = "Give one that resizes to a height and width and normalises"
    problem = Problem("image processor", f"{found}images of one size", fix)
    probes = [_probe(width, height) for width, height in _PROBES]
    try:
        made = described(probes, return_tensors="pt")["pixel_values"]
        mean, std = (torch.tensor(values)[:, None, None] for values in (described.image_mean, described.image_std))
        expected = (resized_bytes(processor, probes) / _BYTE - mean) / std
        resample = Image.Resampling(int(described.resample))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelError(problem) from error
    if made.shape != expected.shape or (made - expected).abs().max() > _TOLERANCE:
        raise ModelError(problem)
    height, width = made.shape[-2:]
    fitting = _probe(width, height)
    keeps = torch.equal(resized_bytes(processor, [fitting])[0], image_bytes(fitting))
    return PixelFormat(height, width, tuple(described.image_mean), tuple(described.image_std), resample, keeps)


def _probe(width: int, height: int) -> Image.Image:
    """Image of many colours, white and black among them."""
    pixels = np.linspace(0, _BYTE, 3 * width * height).astype(np.uint8)
    return Image.fromarray(pixels.reshape(height, width, 3))


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
