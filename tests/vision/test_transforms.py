"""From RGB images to pixel values: the transform of evaluation, and the random crops and flips of training."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from transformers import AutoConfig

from nio_hf.recipe.settings import AugmentationSettings
from nio_hf.vision.augmentation import BatchAugmentation
from nio_hf.vision.processors import (
    EvaluationTransform,
    TrainingTransform,
    make_image_processor,
    pixel_format,
    random_part,
    resized_bytes,
)
from tests.vision.pictures import as_bytes, photo

SIDE = 16
SCALE, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
PROCESSORS = {
    "vit": {"model_type": "vit"},
    "deit": {"model_type": "deit"},
    "convnext": {"model_type": "convnext"},
    "beit": {"model_type": "beit"},
    "resnet": {"model_type": "resnet"},
    "pvt": {"model_type": "pvt"},
    "resize and crop": {"model_type": "swin", "crop_ratio": 0.875, "interpolation": "bicubic"},
    "not square": {"model_type": "vit", "image_size": [12, 20]},
}
SIZES = [(20, 28), (40, 17), (SIDE, SIDE), (9, 7), (1, 1), (3, 9), (1, 30), (30, 1)]
CROPS = pytest.mark.parametrize("crop", ["resized", "padded", "none"])


def processor(name="vit", **changes):
    settings = {**PROCESSORS[name], **changes}
    config = AutoConfig.for_model(settings.pop("model_type"), image_size=settings.pop("image_size", SIDE))
    return make_image_processor(config, **settings)


def training(described=None, **settings):
    return TrainingTransform(described or processor(), AugmentationSettings(**settings))


def photos():
    return [photo(seed, height, width) for seed, (height, width) in enumerate(SIZES)]


def smooth(seed, height=40, width=40):
    return photo(seed, 4, 4).resize((width, height), Image.Resampling.BICUBIC)


def test_evaluation_of_a_vit_is_a_resize_and_a_normalisation():
    mean, std = [0.1, 0.5, 0.9], [0.2, 0.3, 0.4]
    described = processor(image_mean=mean, image_std=std, interpolation="bicubic")
    for image, pixels in zip(photos(), EvaluationTransform(described)(photos()), strict=True):
        resized = as_bytes(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255
        wanted = (resized - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        torch.testing.assert_close(pixels, wanted, atol=1e-6, rtol=1e-6)


def test_evaluation_with_a_crop_ratio_keeps_the_aspect_and_the_centre():
    image = smooth(0, 40, 80)
    resized = image.resize((40, 20), Image.Resampling.BILINEAR).crop((12, 2, 28, 18))
    pixels = EvaluationTransform(processor(crop_ratio=0.8))([image])[0]
    torch.testing.assert_close(pixels, (as_bytes(resized) / 255 - 0.5) / 0.5, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", PROCESSORS)
def test_training_without_a_crop_is_exactly_evaluation_once_it_is_normalised(name):
    described = processor(name)
    pixels = pixel_format(described)
    for images in (photos(), [photos()[0].resize((pixels.width, pixels.height))]):
        random.seed(0)
        before = random.getstate()
        trained = torch.stack(training(described)(images))
        assert random.getstate() == before
        assert torch.equal(trained, resized_bytes(described, images))
        batch = {"pixel_values": trained, "labels": torch.zeros(len(trained), dtype=torch.long)}
        found = BatchAugmentation(pixels, AugmentationSettings(), 2)(batch)["pixel_values"]
        torch.testing.assert_close(found, torch.stack(EvaluationTransform(described)(images)), atol=1e-6, rtol=1e-6)
    assert pixels.keeps == torch.equal(trained[0], as_bytes(images[0]))


@pytest.mark.parametrize("name", PROCESSORS)
@CROPS
def test_training_makes_bytes_of_the_size_that_the_processor_makes(name, crop):
    described, images = processor(name), photos()
    trained = torch.stack(training(described, random_crop=crop, horizontal_flip=0.5)(images))
    assert trained.dtype == torch.uint8
    assert trained.shape == torch.stack(EvaluationTransform(described)(photos())).shape
    for image, original in zip(images, photos(), strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(original))


@CROPS
def test_python_s_random_numbers_alone_decide(crop):
    transform = training(random_crop=crop, horizontal_flip=0.5)

    def drawn(seed, other):
        torch.manual_seed(other)
        np.random.seed(other)
        random.seed(seed)
        return torch.stack(transform(photos()))

    assert torch.equal(drawn(0, 0), drawn(0, 1))
    assert any(not torch.equal(drawn(0, 0), drawn(seed, 0)) for seed in range(1, 5))


@pytest.mark.parametrize("flip", [0.0, 0.3, 1.0])
@CROPS
def test_images_are_flipped_with_the_given_probability(crop, flip):
    random.seed(0)
    whole = {"crop_scale": [1.0, 1.0], "crop_aspect": [1.0, 1.0], "crop_padding": 0}
    image = photo(0, SIDE, SIDE)
    drawn = training(random_crop=crop, horizontal_flip=flip, **whole)([image] * 600)
    flipped = [torch.equal(pixels, as_bytes(image).flip(-1)) for pixels in drawn]
    assert all(is_flipped or torch.equal(p, as_bytes(image)) for is_flipped, p in zip(flipped, drawn, strict=True))
    assert abs(np.mean(flipped) - flip) < 0.07
    assert flip not in (0.0, 1.0) or np.mean(flipped) == flip


def test_a_padded_crop_shows_each_window_about_equally_often_and_zeros_outside():
    random.seed(1)
    image, padding = photo(1, SIDE, SIDE), 2
    padded = torch.nn.functional.pad(as_bytes(image), [padding] * 4)
    windows = {
        padded[:, top : top + SIDE, left : left + SIDE].numpy().tobytes(): (top, left)
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    }
    drawn = training(random_crop="padded", crop_padding=padding)([image] * 2500)
    counts = Counter(windows[window.numpy().tobytes()] for window in drawn)
    assert len(counts) == len(windows) == 25
    assert stats.chisquare(list(counts.values())).pvalue > 0.001
    large = smooth(2)
    resized = as_bytes(large.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    middle = training(random_crop="padded", crop_padding=1)([large] * 100)
    assert any(torch.equal(window, resized) for window in middle)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 400), (400, 1), (3000, 20), (64, 48)])
@pytest.mark.parametrize("scale", [SCALE, (0.9, 1.0), (1e-6, 1e-5)])
def test_a_random_part_is_never_empty_and_always_inside_the_image(size, scale):
    random.seed(0)
    width, height = size
    for _ in range(500):
        left, top, right, bottom = random_part(width, height, scale, ASPECT)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_areas_logarithms_of_aspects_and_places_are_uniform():
    # Every draw of these ranges fits into a square image, so that none is drawn again.
    scale, side = (0.08, 0.7), 4000
    random.seed(2)
    left, top, right, bottom = np.array([random_part(side, side, scale, ASPECT) for _ in range(4000)]).T
    width, height = right - left, bottom - top
    areas, log_aspects = width * height / side**2, np.log(width / height)
    low, high = map(math.log, ASPECT)
    assert stats.kstest(areas, stats.uniform(scale[0], scale[1] - scale[0]).cdf).pvalue > 0.001
    assert stats.kstest(log_aspects, stats.uniform(low, high - low).cdf).pvalue > 0.001
    assert abs(np.corrcoef(areas, log_aspects)[0, 1]) < 0.05
    for first, length in ((left, width), (top, height)):
        assert stats.kstest(first / (side - length), "uniform").pvalue > 0.001


@pytest.mark.parametrize(("size", "wanted"), [((300, 30), 4 / 3), ((30, 300), 3 / 4)])
def test_an_image_too_long_for_any_part_gives_the_largest_one_of_an_allowed_aspect_at_its_centre(size, wanted):
    random.seed(0)
    width, height = size
    ((left, top, right, bottom),) = {random_part(width, height, (0.9, 1.0), ASPECT) for _ in range(50)}
    assert min(size) in (right - left, bottom - top)
    assert abs((right - left) / (bottom - top) - wanted) < 0.05
    assert abs(left + right - width) <= 1
    assert abs(top + bottom - height) <= 1
    assert random_part(40, 20, (1.0, 1.0), (2.0, 2.0)) == (0, 0, 40, 20)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_part_is_resized_with_the_filter_of_the_processor_and_each_image_has_its_own(interpolation):
    image = smooth(3, 40, 60)
    transform = training(processor(interpolation=interpolation), random_crop="resized")
    random.seed(4)
    box = random_part(60, 40, SCALE, ASPECT)
    random.seed(4)
    first, *others = transform([image] * 20)
    resample = Image.Resampling[interpolation.upper()]
    assert torch.equal(first, as_bytes(image.resize((SIDE, SIDE), resample, box=box)))
    assert len({pixels.numpy().tobytes() for pixels in others}) == 19
