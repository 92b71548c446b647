"""From images as they are stored to what a model reads."""

from __future__ import annotations

from typing import Any, cast

import transformers
from transformers import BaseImageProcessor, PreTrainedConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from nio_hf.errors import ModelError, Problem


def make_image_processor(config: PreTrainedConfig) -> BaseImageProcessor:
    """The image processor of an architecture, on Pillow, as published but for the image size of a configuration.

    Where the published one resizes to more than it crops, the ratio of the two is kept.

    Raises:
        ModelError: for an architecture without one.
    """
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(config.model_type, {})
    if "pil" not in names:
        found = f"{config.model_type!r} has no image processor on Pillow"
        raise ModelError(Problem("model_type", found, "Choose another architecture"))
    processor_class: type[Any] = getattr(transformers, names["pil"])
    published: Any = processor_class()
    image_size = getattr(config, "image_size", None)
    if image_size is None:
        return cast(BaseImageProcessor, published)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    sizes = {"size": _scaled(published.size, height, width, published.size)}
    if getattr(published, "do_center_crop", False):
        sizes["size"] = _scaled(published.size, height, width, published.crop_size)
        sizes["crop_size"] = {"height": height, "width": width}
    processor: BaseImageProcessor = processor_class(**sizes)
    return processor


def _scaled(size: Any, height: int, width: int, reference: Any) -> dict[str, int]:
    """A published size for images of height x width, in the ratio that it has to a reference size."""
    size, reference = ({key: value for key, value in dict(s).items() if value} for s in (size, reference))
    wanted = {"height": height, "width": width, "shortest_edge": min(height, width)}
    return {
        key: round(wanted[key] * value / reference.get(key, max(reference.values()))) for key, value in size.items()
    }


class ImageTransform:
    """A transform for `Dataset.with_transform`: rows of images and labels to `pixel_values` and `labels`.

    Args:
        processor: resizes and normalises; pixel values are (channels, height, width).
        image_column: name of the column of images.
        label_column: name of the column of labels.
    """

    def __init__(self, processor: BaseImageProcessor, image_column: str, label_column: str) -> None:
        self._processor = processor
        self._image_column = image_column
        self._label_column = label_column

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        """Columns of n rows: `pixel_values` (n, channels, height, width) and `labels` (n,)."""
        images = [image.convert("RGB") for image in rows[self._image_column]]
        pixel_values = self._processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "labels": rows[self._label_column]}
