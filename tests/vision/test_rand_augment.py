"""RandAugment against Pillow, operation by operation, and against itself, sample by sample."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from nio_hf.vision.rand_augment import OPERATIONS, Draws, RandAugment
from nio_hf.vision.sample_random import SampleRandom

SIDE = 24
FILL = (0.5, 0.25, 0.75)
FILL_BYTES = tuple(round(255 * value) for value in FILL)


def photo(seed: int) -> Image.Image:
    """A smooth image with some noise, so that interpolation matters little and every operation something."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((pixels + generator.integers(-2, 3, pixels.shape)).clip(0, 255).astype(np.uint8))


def tensor(*images: Image.Image) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).float() / 255


def affine(image: Image.Image, *source: float) -> Image.Image:
    a, b, c, d, e, f = source
    # Pillow counts from the corner of a pixel, the operations from its centre.
    data = (a, b, c + 0.5 - 0.5 * a - 0.5 * b, d, e, f + 0.5 - 0.5 * d - 0.5 * e)
    return image.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=FILL_BYTES)


def solarize_add(image: Image.Image, added: int) -> Image.Image:
    return image.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)


PILLOW: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "auto_contrast": lambda image, s: ImageOps.autocontrast(image),
    "equalize": lambda image, s: ImageOps.equalize(image),
    "invert": lambda image, s: ImageOps.invert(image),
    "rotate": lambda image, s: image.rotate(30 * s, Image.Resampling.BILINEAR, fillcolor=FILL_BYTES),
    "posterize": lambda image, s: ImageOps.posterize(image, 4 - int(abs(s) * 4)),
    "solarize": lambda image, s: ImageOps.solarize(image, 256 - int(abs(s) * 256)),
    "solarize_add": lambda image, s: solarize_add(image, int(abs(s) * 110)),
    "color": lambda image, s: ImageEnhance.Color(image).enhance(1 + 0.9 * s),
    "contrast": lambda image, s: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s),
    "brightness": lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s),
    "sharpness": lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s),
    "shear_x": lambda image, s: affine(image, 1, 0.3 * s, 0, 0, 1, 0),
    "shear_y": lambda image, s: affine(image, 1, 0, 0, 0.3 * s, 1, 0),
    "translate_x": lambda image, s: affine(image, 1, 0, 0.45 * SIDE * s, 0, 1, 0),
    "translate_y": lambda image, s: affine(image, 1, 0, 0, 0, 1, 0.45 * SIDE * s),
}
GEOMETRIC = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("strength", [0.35, -0.9])
def test_an_operation_is_that_of_pillow(name: str, strength: float) -> None:
    images = [photo(seed) for seed in range(3)]
    fill = torch.tensor(FILL)
    found = OPERATIONS[name](tensor(*images), torch.full((3,), strength), fill) * 255
    wanted = tensor(*(PILLOW[name](image, strength) for image in images)) * 255
    difference = (found - wanted).abs()
    if name in GEOMETRIC:
        # Pillow interpolates no pixel that lies half outside; there the two differ.
        assert difference.flatten().quantile(0.85) <= 1.5
        assert (difference.amax(1) > 4).float().mean() < 0.12
    else:
        assert difference.max() <= 1.5


@pytest.mark.parametrize("name", sorted(GEOMETRIC))
def test_what_comes_in_from_outside_has_the_colour_of_the_fill(name: str) -> None:
    black = torch.zeros(2, 3, SIDE, SIDE)
    moved = OPERATIONS[name](black, torch.tensor([0.9, -0.9]), torch.tensor(FILL))
    torch.testing.assert_close(moved.amax((-2, -1)), torch.tensor([FILL, FILL]))


def test_a_constant_image_has_no_contrast_to_stretch() -> None:
    grey = torch.full((1, 3, SIDE, SIDE), 0.4)
    for name in ("auto_contrast", "equalize"):
        torch.testing.assert_close(OPERATIONS[name](grey, torch.ones(1), torch.zeros(3)), grey, atol=0.003, rtol=0)


def test_a_batch_is_augmented_as_its_samples_are_one_by_one() -> None:
    augment = RandAugment(magnitude=9, magnitude_std=0.5, layers=2, prob=0.8, fill=FILL)
    images = tensor(*(photo(seed) for seed in range(60)))
    draws = augment.draw(SampleRandom(range(60)))
    assert len(draws.operations.unique()) == len(OPERATIONS) + 1
    together = augment.apply(images, draws)
    for index in range(len(images)):
        alone = Draws(draws.operations[:, index : index + 1], draws.strengths[:, index : index + 1])
        torch.testing.assert_close(augment.apply(images[index : index + 1], alone)[0], together[index])


def test_draws_have_the_published_distribution() -> None:
    augment = RandAugment(magnitude=9, magnitude_std=0.5, layers=2, prob=0.5, fill=FILL)
    draws = augment.draw(SampleRandom(range(20_000)))
    applied = draws.operations >= 0
    assert abs(applied.float().mean() - 0.5) < 0.01
    shares = torch.bincount(draws.operations[applied], minlength=len(OPERATIONS)) / applied.sum()
    assert (shares - 1 / len(OPERATIONS)).abs().max() < 0.006
    assert abs((draws.operations[0] == draws.operations[1])[applied.all(0)].float().mean() - 1 / 15) < 0.01
    magnitudes = draws.strengths.abs() * 10
    assert magnitudes.max() <= 10
    assert abs(magnitudes.mean() - (9 - 0.5 * clipped_mean(2.0))) < 0.01
    assert abs((draws.strengths > 0).float().mean() - 0.5) < 0.01


def clipped_mean(bound: float) -> float:
    """Mean of max(z - bound, 0) of a standard normal z: what a clamp at `bound` takes from the mean."""
    density = math.exp(-bound * bound / 2) / math.sqrt(2 * math.pi)
    return density - bound * 0.5 * math.erfc(bound / math.sqrt(2))


def test_without_probability_nothing_changes() -> None:
    images = tensor(photo(0))
    augment = RandAugment(magnitude=9, magnitude_std=0, layers=2, prob=0, fill=FILL)
    assert torch.equal(augment(images, SampleRandom([0])), images)
