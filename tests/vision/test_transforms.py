"""From stored images to what a model reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from nio_hf.errors import ModelError
from nio_hf.vision.transforms import ImageTransform, make_image_processor


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P"])
def test_images_of_any_mode_become_normalised_pixel_values(mode: str) -> None:
    processor = make_image_processor(AutoConfig.for_model("vit", image_size=8))
    image = Image.fromarray(np.full((16, 16), 255, np.uint8)).convert(mode)
    columns = ImageTransform(processor, "image", "label")({"image": [image, image], "label": [0, 1]})
    assert columns["pixel_values"].shape == (2, 3, 8, 8)
    assert columns["labels"] == [0, 1]
    torch.testing.assert_close(columns["pixel_values"], torch.ones(2, 3, 8, 8), atol=0.02, rtol=0)


@pytest.mark.parametrize("model_type", ["vit", "swin", "swinv2", "deit", "beit", "dinov2", "convnext", "resnet"])
def test_the_size_is_that_of_the_model(model_type: str) -> None:
    assert model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    config = AutoConfig.for_model(model_type)
    if hasattr(config, "image_size"):
        config.image_size = 64
    processor = make_image_processor(config)
    image = Image.fromarray(np.zeros((300, 280, 3), np.uint8))
    pixels = ImageTransform(processor, "i", "l")({"i": [image], "l": [0]})["pixel_values"]
    assert pixels.shape[-2:] == ((64, 64) if hasattr(config, "image_size") else pixels.shape[-2:])


def test_an_architecture_without_an_image_processor_is_refused() -> None:
    with pytest.raises(ModelError, match="no image processor on Pillow"):
        make_image_processor(AutoConfig.for_model("bert"))
