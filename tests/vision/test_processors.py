"""Image processors: settings of a recipe, saving and loading, and pixel formats."""

import dataclasses

import pytest
import torch
from PIL import Image
from transformers import AutoConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from nio_hf.errors import ModelError
from nio_hf.vision.processors import EvaluationTransform, PixelFormat, make_image_processor, pixel_format
from tests.vision.pictures import photo

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make(model_type, size=32, **settings):
    config = AutoConfig.for_model(model_type)
    if hasattr(config, "image_size"):
        config.image_size = size
    else:
        settings = {"image_size": size, **settings}
    return make_image_processor(config, **settings)


def shape(processor, height=50, width=40):
    return tuple(EvaluationTransform(processor)([photo(0, height, width)])[0].shape)


@pytest.mark.parametrize(
    "model_type",
    ["vit", "swin", "swinv2", "deit", "beit", "dinov2", "convnext", "convnextv2", "resnet", "regnet", "pvt", "levit"],
)
@pytest.mark.parametrize("size", [32, 384])
def test_images_have_the_size_of_the_model(model_type, size):
    processor = make(model_type, size)
    assert shape(processor) == shape(processor, 30, 90) == (3, size, size)
    described = pixel_format(processor)
    assert (described.height, described.width) == (size, size)


def test_the_published_normalisation_interpolation_and_ratio_of_resize_to_crop_are_kept():
    assert pixel_format(make("vit")) == PixelFormat(32, 32, HALF, HALF, Image.Resampling.BILINEAR, keeps=True)
    assert pixel_format(make("deit")) == PixelFormat(32, 32, HALF, HALF, Image.Resampling.BICUBIC, keeps=False)
    pvt = PixelFormat(32, 32, IMAGENET_MEAN, IMAGENET_STD, Image.Resampling.BICUBIC, keeps=True)
    assert pixel_format(make("pvt")) == pvt
    assert pixel_format(make("pvt", crop_ratio=0.5)) == dataclasses.replace(pvt, keeps=False)
    processor = make("deit", 112)
    assert (dict(processor.size)["height"], dict(processor.crop_size)["height"]) == (128, 112)
    for crop_ratio, shorter in ((0.875, 37), (1.0, 32), (0.5, 64)):
        processor = make("swin", crop_ratio=crop_ratio)
        assert (dict(processor.size)["shortest_edge"], shape(processor, 30, 90)) == (shorter, (3, 32, 32))
    unsized = make_image_processor(AutoConfig.for_model("resnet"), crop_ratio=0.5)
    assert shape(unsized) == (3, 384, 384)


@pytest.mark.parametrize("model_type", ["vit", "deit", "swin", "resnet", "convnext"])
def test_what_is_given_goes_before_what_is_published(model_type):
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    for crop_ratio in (None, 0.8):
        processor = make(model_type, image_mean=mean, image_std=std, interpolation="bicubic", crop_ratio=crop_ratio)
        found = pixel_format(processor)
        assert found == PixelFormat(32, 32, tuple(mean), tuple(std), Image.Resampling.BICUBIC, found.keeps)


@pytest.mark.parametrize("crop_ratio", [None, 0.8, 1.0])
def test_images_of_a_model_that_is_not_square_fill_it(crop_ratio):
    processor = make("vit", [16, 24], crop_ratio=crop_ratio)
    described = pixel_format(processor)
    assert (described.height, described.width) == (16, 24)
    pixels = EvaluationTransform(processor)([Image.new("RGB", (40, 40), (255, 255, 255))])[0]
    assert pixels.shape == (3, 16, 24)
    assert pixels.min() == pixels.max() == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "vit"},
        {"model_type": "deit"},
        {"model_type": "resnet"},
        {"model_type": "swin", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "interpolation": "bicubic"},
        {"model_type": "vit", "crop_ratio": 0.875, "interpolation": "bicubic"},
        {"model_type": "vit", "size": [16, 24]},
    ],
)
def test_a_saved_processor_makes_the_same_of_images_when_it_is_found_again(settings, tmp_path):
    processor = make(**settings)
    processor.save_pretrained(tmp_path)
    found = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    images = [photo(0, 50, 40), photo(1, 20, 70), photo(2, 1, 1)]
    before, after = (torch.stack(EvaluationTransform(one)(images)) for one in (processor, found))
    assert torch.equal(before, after)
    assert pixel_format(found) == pixel_format(processor)


def test_an_architecture_without_an_image_processor_or_images_of_one_size_is_refused():
    with pytest.raises(ModelError) as raised:
        make_image_processor(AutoConfig.for_model("bert"))
    message = "model_type: 'bert' has no image processor on Pillow. Choose another architecture."
    assert str(raised.value) == message
    for model_type in ("siglip2", "imagegpt", "textnet", "efficientnet"):
        with pytest.raises(ModelError):
            pixel_format(make(model_type))


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(do_normalize=False),
        ViTImageProcessorPil(do_rescale=False),
        ViTImageProcessorPil(size={"longest_edge": 32}),
        ViTImageProcessorPil(do_resize=False),
        ViTImageProcessorPil(rescale_factor=1 / 127.5),
        BitImageProcessorPil(do_center_crop=True, do_normalize=False),
        BitImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False),
    ],
)
def test_a_processor_that_makes_no_normalised_images_of_one_size_is_refused(processor):
    with pytest.raises(ModelError, match="does not make normalised images of one size") as raised:
        pixel_format(processor)
    message = str(raised.value)
    assert message.startswith(f"image processor: {type(processor).__name__} with size ")
    assert message.endswith("Give one that resizes to a height and width and normalises.")
