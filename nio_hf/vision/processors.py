"""The image processor: what a model reads, in training and ever after."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from nio_hf.errors import ModelError, Problem

_BYTE = 255
_PROBES = ((60, 40), (40, 60), (500, 400))
_TOLERANCE = 1e-3
_NO_FORMAT = "does not make normalised images of one size"


@dataclasses.dataclass(frozen=True)
class PixelFormat:
    """What an image processor makes of images, for those who augment them.

    Attributes:
        height: of the result in pixels.
        width: likewise.
        mean: of each channel, over pixels in [0, 1].
        std: standard deviation likewise.
        resample: Pillow's filter of resizing.
        keeps: whether images of that height and width are left as they are.
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
    """The image processor of an architecture, on Pillow, as published but for what is given.

    Args:
        config: of the model; its image size is used where it has one.
        image_size: for a config without one.
        image_mean: mean of each channel over pixels in [0, 1].
        image_std: standard deviation likewise.
        interpolation: "bilinear" or "bicubic".
        crop_ratio: resize the shorter side to image_size / crop_ratio and crop the centre. None for what the
            published one does, with the ratio of the sizes that it resizes and crops to kept.

    Raises:
        ModelError: for an architecture without an image processor.
    """
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(config.model_type, {})
    if "pil" not in names:
        found = f"{config.model_type!r} has no image processor on Pillow"
        raise ModelError(Problem("model_type", found, "Choose another architecture"))
    processor_class: type[Any] = getattr(transformers, names["pil"])
    published: Any = processor_class()
    if not published.size:
        found = f"the image processor of {config.model_type!r} resizes to no size"
        raise ModelError(Problem("model_type", found, "Choose another architecture"))
    size = getattr(config, "image_size", None) or image_size
    changes: dict[str, Any] = {"image_mean": image_mean, "image_std": image_std}
    changes["resample"] = None if interpolation is None else Image.Resampling[interpolation.upper()]
    changes = {key: value for key, value in changes.items() if value is not None}
    if crop_ratio is not None:
        return _resize_and_crop(published, size or _side(published), crop_ratio, changes)
    if size is None:
        return cast(BaseImageProcessor, processor_class(**changes))
    height, width = (size, size) if isinstance(size, int) else size
    changes["size"] = _scaled(published.size, height, width, published.size)
    if getattr(published, "do_center_crop", False):
        changes["size"] = _scaled(published.size, height, width, published.crop_size)
        changes["crop_size"] = {"height": height, "width": width}
    return cast(BaseImageProcessor, processor_class(**changes))


def image_bytes(image: Image.Image) -> torch.Tensor:
    """An image as it is: bytes (channels, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resized_bytes(processor: BaseImageProcessor, images: list[Image.Image]) -> torch.Tensor:
    """Images as a processor resizes and crops them, before it scales them: bytes (n, channels, height, width)."""
    described: Any = processor
    made: torch.Tensor = described(images, do_rescale=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    return made.round().clamp(0, _BYTE).to(torch.uint8)


def pixel_format(processor: BaseImageProcessor) -> PixelFormat:
    """What an image processor makes of images: size, mean, standard deviation, interpolation.

    It is tried on images of different shapes: only one that makes (resized bytes / 255 - mean) / std of them, all of
    one size, can be augmented for.

    Raises:
        ModelError: for another one.
    """
    described: Any = processor
    probes = [_probe(width, height) for width, height in _PROBES]
    size = {key: value for key, value in dict(getattr(described, "size", None) or {}).items() if value}
    fix = "Give one that resizes to a height and width and normalises"
    problem = Problem("image processor", f"{type(processor).__name__} with size {size} {_NO_FORMAT}", fix)
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
    return PixelFormat(
        height=height,
        width=width,
        mean=tuple(described.image_mean),
        std=tuple(described.image_std),
        resample=resample,
        keeps=torch.equal(resized_bytes(processor, [fitting])[0], image_bytes(fitting)),
    )


def _probe(width: int, height: int) -> Image.Image:
    """An image of many colours, white and black among them."""
    pixels = np.linspace(0, _BYTE, 3 * width * height).astype(np.uint8)
    return Image.fromarray(pixels.reshape(height, width, 3))


def _resize_and_crop(published: Any, size: Any, crop_ratio: float, changes: dict[str, Any]) -> BaseImageProcessor:
    """A processor that keeps the aspect ratio: resize so that size / crop_ratio is covered, and crop the centre."""
    height, width = (size, size) if isinstance(size, int) else size
    kept = {key: getattr(published, key) for key in ("image_mean", "image_std", "resample")}
    processor: BaseImageProcessor = BitImageProcessorPil(
        **{**kept, **changes},
        size={"shortest_edge": round(max(height, width) / crop_ratio)},
        crop_size={"height": height, "width": width},
    )
    return processor


def _side(published: Any) -> int:
    """The side of the images of a published processor."""
    sizes: list[int] = [
        value for value in dict(getattr(published, "crop_size", None) or published.size).values() if value
    ]
    return max(sizes)


def _scaled(size: Any, height: int, width: int, reference: Any) -> dict[str, int]:
    """A published size for images of height x width, in the ratio that it has to a reference size."""
    size, reference = ({key: value for key, value in dict(s).items() if value} for s in (size, reference))
    wanted = {"height": height, "width": width, "shortest_edge": min(height, width)}
    return {
        key: round(wanted[key] * value / reference.get(key, max(reference.values()))) for key, value in size.items()
    }
