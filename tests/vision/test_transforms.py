"""From RGB images to pixel values: what inference sees, and the random crops and flips of training."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from transformers import AutoConfig, BaseImageProcessor

from nio_hf.vision.augmentation import BatchAugmentation
from nio_hf.vision.processors import make_image_processor, pixel_format, resized_bytes
from nio_hf.vision.transforms import EvaluationTransform, TrainingTransform, random_part
from tests.vision.pictures import as_bytes, photo

SIDE = 16
SCALE, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
PROCESSORS: dict[str, dict[str, Any]] = {
    "vit": {"model_type": "vit"},
    "deit": {"model_type": "deit"},
    "convnext": {"model_type": "convnext"},
    "resize and crop": {"model_type": "swin", "crop_ratio": 0.875, "interpolation": "bicubic"},
    "not square": {"model_type": "vit", "image_size": [12, 20]},
}
SIZES = [(20, 28), (40, 17), (SIDE, SIDE), (9, 7), (1, 1), (3, 9), (1, 30), (30, 1)]


def processor(name: str = "vit", **changes: Any) -> BaseImageProcessor:
    settings = {**PROCESSORS[name], **changes}
    config = AutoConfig.for_model(settings.pop("model_type"), image_size=settings.pop("image_size", SIDE))
    return make_image_processor(config, **settings)


def photos() -> list[Image.Image]:
    return [photo(seed, height, width) for seed, (height, width) in enumerate(SIZES)]


def smooth(seed: int, height: int = 40, width: int = 40) -> Image.Image:
    return photo(seed, 4, 4).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", PROCESSORS)
def test_evaluation_sees_what_the_image_processor_makes_of_each_image(name: str) -> None:
    described = processor(name)
    found = EvaluationTransform(described)(photos())
    assert len(found) == len(SIZES)
    for image, pixels in zip(photos(), found, strict=True):
        assert torch.equal(pixels, described(image, return_tensors="pt")["pixel_values"][0])


def test_evaluation_of_a_vit_is_a_resize_and_a_normalisation() -> None:
    mean, std = [0.1, 0.5, 0.9], [0.2, 0.3, 0.4]
    described = processor(image_mean=mean, image_std=std, interpolation="bicubic")
    for image, pixels in zip(photos(), EvaluationTransform(described)(photos()), strict=True):
        resized = as_bytes(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255
        wanted = (resized - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        torch.testing.assert_close(pixels, wanted, atol=1e-6, rtol=1e-6)


def test_evaluation_with_a_crop_ratio_keeps_the_aspect_and_the_centre() -> None:
    described = processor(crop_ratio=0.8)
    image = smooth(0, 40, 80)
    resized = image.resize((40, 20), Image.Resampling.BILINEAR).crop((12, 2, 28, 18))
    pixels = EvaluationTransform(described)([image])[0]
    torch.testing.assert_close(pixels, (as_bytes(resized) / 255 - 0.5) / 0.5, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", PROCESSORS)
def test_training_without_a_crop_is_exactly_evaluation_once_it_is_normalised(name: str) -> None:
    described = processor(name)
    trained = TrainingTransform(described, crop="none")(photos())
    assert {pixels.dtype for pixels in trained} == {torch.uint8}
    batch = {"pixel_values": torch.stack(trained), "labels": torch.zeros(len(trained), dtype=torch.long)}
    found = BatchAugmentation(pixel_format(described))(batch)["pixel_values"]
    torch.testing.assert_close(found, torch.stack(EvaluationTransform(described)(photos())), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_of_the_size_of_the_processor_are_what_it_makes_of_them(name: str) -> None:
    described = processor(name)
    pixels = pixel_format(described)
    image = photos()[0].resize((pixels.width, pixels.height))
    found = TrainingTransform(described, crop="none")([image])[0]
    assert torch.equal(found, resized_bytes(described, [image])[0])
    assert pixels.keeps == torch.equal(found, as_bytes(image))


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("crop", ["resized", "padded", "none"])
def test_training_makes_bytes_of_the_size_that_the_processor_makes(name: str, crop: str) -> None:
    described = processor(name)
    evaluated = EvaluationTransform(described)(photos())
    trained = TrainingTransform(described, crop=crop, flip=0.5)(photos())
    assert len(trained) == len(SIZES)
    for pixels, wanted in zip(trained, evaluated, strict=True):
        assert pixels.dtype == torch.uint8
        assert pixels.shape == wanted.shape
    torch.stack(trained)


@pytest.mark.parametrize("crop", ["resized", "padded", "none"])
def test_python_s_random_numbers_alone_decide(crop: str) -> None:
    transform = TrainingTransform(processor(), crop=crop, flip=0.5)

    def drawn(seed: int, other: int) -> torch.Tensor:
        torch.manual_seed(other)
        np.random.seed(other)
        random.seed(seed)
        return torch.stack(transform(photos()))

    assert torch.equal(drawn(0, 0), drawn(0, 1))
    assert any(not torch.equal(drawn(0, 0), drawn(seed, 0)) for seed in range(1, 5))


def test_training_without_a_crop_and_a_flip_draws_nothing() -> None:
    random.seed(0)
    before = random.getstate()
    TrainingTransform(processor(), crop="none")(photos())
    assert random.getstate() == before


def test_images_are_left_as_they_were() -> None:
    for crop in ("resized", "padded", "none"):
        images = photos()
        TrainingTransform(processor(), crop=crop, flip=1.0)(images)
        for image, original in zip(images, photos(), strict=True):
            np.testing.assert_array_equal(np.asarray(image), np.asarray(original))


# Flips


@pytest.mark.parametrize("flip", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("crop", ["padded", "none", "resized"])
def test_images_are_flipped_with_the_given_probability(crop: str, flip: float) -> None:
    random.seed(0)
    image = photo(0, SIDE, SIDE)
    transform = TrainingTransform(processor(), crop=crop, scale=(1.0, 1.0), aspect=(1.0, 1.0), padding=0, flip=flip)
    upright = as_bytes(image)
    drawn = transform([image] * 600)
    flipped = [torch.equal(pixels, upright.flip(-1)) for pixels in drawn]
    assert all(mirrored or torch.equal(pixels, upright) for mirrored, pixels in zip(flipped, drawn, strict=True))
    assert abs(np.mean(flipped) - flip) < 0.07
    if flip in (0.0, 1.0):
        assert np.mean(flipped) == flip


# Padded crops


def test_a_padded_crop_shows_each_window_about_equally_often_and_zeros_outside() -> None:
    random.seed(1)
    image, padding = photo(1, SIDE, SIDE).point(lambda value: max(value, 1)), 2
    pixels = as_bytes(image)
    padded = torch.nn.functional.pad(pixels, [padding] * 4)
    windows = {
        padded[:, top : top + SIDE, left : left + SIDE].numpy().tobytes(): (top, left)
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    }
    assert len(windows) == 25
    drawn = TrainingTransform(processor(), crop="padded", padding=padding)([image] * 2500)
    counts = Counter(windows[window.numpy().tobytes()] for window in drawn)
    assert len(counts) == 25
    assert stats.chisquare(list(counts.values())).pvalue > 0.001
    corner = next(w for w in drawn if windows[w.numpy().tobytes()] == (0, 0))
    assert corner[:, :padding].max() == 0
    assert corner[:, :, :padding].max() == 0
    assert corner[:, padding:, padding:].min() > 0


def test_padding_surrounds_the_image_as_the_processor_resizes_it() -> None:
    random.seed(0)
    image = smooth(2)
    resized = as_bytes(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    middle = TrainingTransform(processor(), crop="padded", padding=1)([image] * 100)
    assert any(torch.equal(window, resized) for window in middle)


# Random parts


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 400), (400, 1), (3000, 20), (20, 3000), (64, 48)])
@pytest.mark.parametrize("scale", [SCALE, (0.9, 1.0), (1e-6, 1e-5)])
def test_a_random_part_is_never_empty_and_always_inside_the_image(
    size: tuple[int, int], scale: tuple[float, float]
) -> None:
    random.seed(0)
    width, height = size
    for _ in range(500):
        left, top, right, bottom = random_part(width, height, scale, ASPECT)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def parts(count: int, scale: tuple[float, float], aspect: tuple[float, float], side: int = 4000) -> np.ndarray:
    """(area as a share of the image, logarithm of width / height, left, top, width, height) of random parts."""
    random.seed(2)
    drawn = []
    for _ in range(count):
        left, top, right, bottom = random_part(side, side, scale, aspect)
        width, height = right - left, bottom - top
        drawn.append((width * height / side**2, math.log(width / height), left, top, width, height))
    return np.array(drawn)


def test_areas_and_logarithms_of_aspects_are_uniform() -> None:
    # Every draw of these ranges fits into a square image, so that none is drawn again.
    scale, aspect = (0.08, 0.7), (3 / 4, 4 / 3)
    areas, log_aspects, *_ = parts(4000, scale, aspect).T
    assert stats.kstest(areas, stats.uniform(scale[0], scale[1] - scale[0]).cdf).pvalue > 0.001
    low, high = map(math.log, aspect)
    assert stats.kstest(log_aspects, stats.uniform(low, high - low).cdf).pvalue > 0.001
    assert abs(np.corrcoef(areas, log_aspects)[0, 1]) < 0.05


def test_places_are_uniform_over_where_a_part_fits() -> None:
    _, _, left, top, width, height = parts(4000, (0.1, 0.6), ASPECT).T
    for first, length in ((left, width), (top, height)):
        assert stats.kstest(first / (4000 - length), "uniform").pvalue > 0.001


@pytest.mark.parametrize(("size", "wanted"), [((300, 30), 4 / 3), ((30, 300), 3 / 4)])
def test_an_image_too_long_for_any_part_gives_the_largest_one_of_an_allowed_aspect_at_its_centre(
    size: tuple[int, int], wanted: float
) -> None:
    random.seed(0)
    width, height = size
    drawn = {random_part(width, height, (0.9, 1.0), ASPECT) for _ in range(50)}
    assert len(drawn) == 1
    left, top, right, bottom = drawn.pop()
    assert min(size) in (right - left, bottom - top)
    assert abs((right - left) / (bottom - top) - wanted) < 0.05
    assert abs(left + right - width) <= 1
    assert abs(top + bottom - height) <= 1


def test_a_long_image_of_which_no_part_fits_is_whole_where_its_own_aspect_is_allowed() -> None:
    assert random_part(40, 20, (1.0, 1.0), (2.0, 2.0)) == (0, 0, 40, 20)


def test_a_part_is_resized_with_the_filter_of_the_processor() -> None:
    image = smooth(3, 40, 60)
    for interpolation, resample in (("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)):
        transform = TrainingTransform(processor(interpolation=interpolation), crop="resized")
        random.seed(4)
        box = random_part(60, 40, SCALE, ASPECT)
        random.seed(4)
        found = transform([image])[0]
        assert torch.equal(found, as_bytes(image.resize((SIDE, SIDE), resample, box=box)))


def test_each_image_of_a_batch_has_its_own_crop() -> None:
    random.seed(0)
    drawn = TrainingTransform(processor(), crop="resized")([smooth(5)] * 20)
    assert len({pixels.numpy().tobytes() for pixels in drawn}) == 20
