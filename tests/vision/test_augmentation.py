"""Augmentation of a batch on its device: scaling, operations, normalisation, erasing and mixing, sample by sample."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats

from nio_hf.recipe.settings import AugmentationSettings
from nio_hf.vision.augmentation import BatchAugmentation, mix_batch
from nio_hf.vision.processors import PixelFormat
from nio_hf.vision.rand_augment import OPERATIONS, draw_operations
from tests.vision.pictures import as_bytes

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PER_CHANNEL = torch.tensor([MEAN, STD]).view(2, 3, 1, 1)
CLASSES = 7
RANDAUGMENT = {"randaugment_magnitude": 9.0, "randaugment_magnitude_std": 0.5}
MIXED = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
UNMIXED = {**RANDAUGMENT, "color_jitter": 0.4, "random_erasing": 0.5}
EVERYTHING = {**UNMIXED, **MIXED}
EACH = [{}, RANDAUGMENT, {"color_jitter": 0.4}, {"random_erasing": 0.5}, MIXED, EVERYTHING]


def augmentation(**settings):
    pixels = PixelFormat(16, 16, MEAN, STD, Image.Resampling.BILINEAR, keeps=True)
    return BatchAugmentation(pixels, AugmentationSettings(**settings), CLASSES)


def batch(size=8, side=16):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (size, 3, side, side), generator=generator, dtype=torch.uint8)
    return {"pixel_values": images, "labels": torch.arange(size) % CLASSES}


@pytest.mark.parametrize("settings", EACH)
def test_bytes_become_floats_and_what_is_given_stays_as_it_was(settings):
    for size, side in ((8, 16), (1, 16), (2, 33)):
        given = {**batch(size, side), "weights": torch.ones(8), "name": "batch"}
        found = augmentation(**settings)(given)
        assert found.keys() == given.keys()
        assert found["weights"] is given["weights"]
        assert all(torch.equal(given[key], value) for key, value in batch(size, side).items())
        assert found["pixel_values"].dtype == torch.float32
        assert found["pixel_values"].shape == (size, 3, side, side)
        assert found["pixel_values"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_images_are_only_scaled_and_normalised_where_everything_is_off(dtype):
    before, default = torch.get_rng_state(), torch.get_default_dtype()
    made = augmentation()
    torch.set_default_dtype(dtype)
    try:
        found = made(batch())["pixel_values"]
    finally:
        torch.set_default_dtype(default)
    expected = ((batch()["pixel_values"].double() / 255 - PER_CHANNEL[0]) / PER_CHANNEL[1]).float()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(torch.get_rng_state(), before)
    assert not made.is_random


@pytest.mark.parametrize("settings", EACH[1:])
def test_without_seeds_the_draws_depend_on_the_seed_of_torch_alone(settings):
    def drawn(seed, other):
        np.random.seed(other)
        torch.manual_seed(seed)
        return augmentation(**settings)(batch())["pixel_values"]

    assert torch.equal(drawn(0, 0), drawn(0, 1))
    assert any(not torch.equal(drawn(0, 0), drawn(seed, 0)) for seed in range(1, 4))


def test_a_sample_is_augmented_by_its_seed_whatever_batch_and_process_it_is_in():
    made = augmentation(**UNMIXED)
    given = {**batch(100), "seeds": torch.arange(100, 200)}
    together = made(given)
    assert "seeds" not in together
    for rows in (slice(0, 40), slice(40, 100), *(slice(row, row + 1) for row in range(100))):
        torch.manual_seed(rows.start)
        alone = made({key: value[rows] for key, value in given.items()})["pixel_values"]
        torch.testing.assert_close(alone, together["pixel_values"][rows])
    other = made({**given, "seeds": torch.arange(100)})["pixel_values"]
    assert ((other - together["pixel_values"]).abs().flatten(1).amax(1) > 1e-3).all()


def test_a_batch_is_mixed_by_the_seed_of_its_first_sample_and_the_state_of_torch_left_alone():
    made, given, before = augmentation(**EVERYTHING), {**batch(), "seeds": torch.arange(8)}, torch.get_rng_state()
    first = made(given)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = made(given)
    assert torch.equal(first["pixel_values"], again["pixel_values"]), "lower precision around it changes nothing"
    assert torch.equal(first["labels"], again["labels"])
    assert not torch.equal(made({**given, "seeds": torch.arange(1, 9)})["labels"], first["labels"])
    assert torch.equal(made(given, mix=False)["labels"], given["labels"])
    assert torch.equal(augmentation(**UNMIXED)(given)["labels"], given["labels"])


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_a_grey_image_is_only_made_lighter_or_darker_within_the_strength(strength):
    torch.manual_seed(2)
    given = {"pixel_values": torch.full((500, 3, 4, 4), 100, dtype=torch.uint8), "labels": torch.zeros(500).long()}
    found = augmentation(color_jitter=strength)(given)["pixel_values"] * PER_CHANNEL[1] + PER_CHANNEL[0]
    torch.testing.assert_close(found, found[:, :1, :1, :1].expand_as(found), atol=1e-5, rtol=0)
    factors = found[:, 0, 0, 0] / (100 / 255)
    assert factors.min() >= 1 - strength - 1e-4
    assert factors.max() <= 1 + strength + 1e-4
    assert abs(factors.mean() - 1) < 0.06
    assert abs(factors.std() - strength / 3**0.5) < 0.04
    assert factors.unique().numel() > 450


def erased_of(probability, size, side):
    """Return (images with random erasing, mask (size, side, side) of the changed pixels)."""
    torch.manual_seed(0)
    found = augmentation(random_erasing=probability)(batch(size, side))["pixel_values"]
    return found, (found != augmentation()(batch(size, side))["pixel_values"]).any(1)


@pytest.mark.parametrize("probability", [0.25, 1.0])
def test_as_many_samples_are_erased_as_the_probability_says(probability):
    _, erased = erased_of(probability, 1000, 16)
    share = erased.flatten(1).any(1).float().mean()
    assert abs(share - probability) < 0.05
    assert probability < 1 or share == 1


def test_what_is_erased_is_a_rectangle_of_the_published_area_and_aspect_anywhere():
    side = 64
    _, erased = erased_of(1.0, 400, side)
    shares, aspects = [], []
    for mask in erased:
        height, width = (int(places.max() - places.min()) + 1 for places in mask.nonzero().T)
        assert int(mask.sum()) == height * width
        shares.append(height * width / side**2)
        aspects.append(height / width)
    assert 0.01 < min(shares) < 0.04
    assert 0.28 < max(shares) < 0.36
    assert abs(np.mean(shares) - (0.02 + 1 / 3) / 2) < 0.02
    assert 0.2 < min(aspects) < 0.5
    assert 2 < max(aspects) < 5
    assert abs(np.mean(np.log(aspects))) < 0.2
    assert erased.any(0).float().mean() > 0.98


def test_a_rectangle_is_filled_with_normal_noise_that_differs_between_pixels_channels_and_samples():
    found, erased = erased_of(1.0, 200, 32)
    noise = torch.stack([found[:, channel][erased] for channel in range(3)])
    assert noise.mean(1).abs().max() < 0.02
    assert (noise.std(1) - 1).abs().max() < 0.02
    assert (torch.corrcoef(noise) - torch.eye(3)).abs().max() < 0.02
    assert noise.flatten().unique().numel() > 0.99 * noise.numel()


def mixed(images, labels, **settings):
    return mix_batch(images, labels, AugmentationSettings(**{**MIXED, **settings}), CLASSES)


MIXUP, CUTMIX = {"cutmix_alpha": 0.0}, {"mixup_alpha": 0.0}


def constant(size, side=16, width=None):
    """Images of one value each: image i is i everywhere, so that pixels show their sources."""
    return torch.arange(size, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, side, width or side).clone()


PAIR = torch.tensor([0, 1])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_the_share_of_mixup_is_beta_distributed(alpha):
    torch.manual_seed(0)
    images = constant(2, 2)
    shares = [float(mixed(images, PAIR, mixup_alpha=alpha, cutmix_alpha=0)[1][0, 0]) for _ in range(1500)]
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 0.001


@pytest.mark.parametrize("size", [1, 2, 8, 9])
@pytest.mark.parametrize("settings", [MIXUP, CUTMIX, {}])
def test_targets_match_the_pixels_sum_to_one_and_the_partner_is_the_reversed_batch(settings, size):
    torch.manual_seed(1)
    images, labels = constant(size), torch.arange(size) % CLASSES
    for _ in range(20):
        pixels, targets = mixed(images, labels, **settings)
        for row in range(size):
            partner = size - 1 - row
            share = 1.0 if row == partner else (float(pixels[row].mean()) - partner) / (row - partner)
            wanted = torch.zeros(CLASSES)
            wanted[labels[row]] += share
            wanted[labels[partner]] += 1 - share
            torch.testing.assert_close(targets[row], wanted, atol=1e-5, rtol=0)
    assert torch.equal(images, constant(size))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (7, 31), (1, 1), (224, 9)])
def test_cutmix_puts_a_box_of_the_partner_into_each_image_at_one_place(height, width):
    torch.manual_seed(2)
    images, labels, seen = constant(6, height, width), torch.arange(6), torch.zeros(height, width)
    for _ in range(40):
        pixels, targets = mixed(images, labels, **CUTMIX, cutmix_alpha=1e4)
        cut = torch.stack([pixels[row] == 5 - row for row in range(6)])
        assert torch.equal(cut, cut[:1, :1].expand_as(cut))
        rows, columns = cut[0, 0].any(1), cut[0, 0].any(0)
        assert torch.equal(cut[0, 0], rows[:, None] & columns[None])
        for edges in (rows, columns):
            places = edges.nonzero().flatten()
            assert len(places) == 0 or len(places) == places.max() - places.min() + 1
        torch.testing.assert_close(targets[0, 0], 1 - cut[0, 0].float().mean())
        seen += cut[0, 0]
        if rows.any() and not (rows[0] or rows[-1] or columns[0] or columns[-1]):
            # lambda is about 1 / 2, and so is the area of the box.
            assert abs(int(rows.sum()) - height / 2**0.5) <= 3
            assert abs(int(columns.sum()) - width / 2**0.5) <= 3
    assert height == 1 or seen.min() > 0


@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_as_many_batches_are_mixed_and_cut_as_the_probabilities_say(prob):
    torch.manual_seed(8)
    images = constant(2, 32)
    made = [mixed(images, PAIR, **MIXUP, mix_prob=prob) for _ in range(400)]
    share = np.mean([not torch.equal(targets, torch.eye(CLASSES)[PAIR]) for _, targets in made])
    assert all(torch.equal(pixels, images) == bool((targets[:, :2] == torch.eye(2)).all()) for pixels, targets in made)
    # A blend of 0 and 1 is neither; a box leaves both as they are.
    switched = [mixed(images, PAIR, mixup_alpha=2.0, mix_switch_prob=prob)[0] for _ in range(400)]
    cut = np.mean([bool(((pixels == 0) | (pixels == 1)).all()) for pixels in switched])
    for found in (share, cut):
        assert abs(found - prob) < 0.08
        assert prob not in (0.0, 1.0) or found == prob


SIDE = 24
FILL = (0.5, 0.25, 0.75)
FILL_BYTES = tuple(round(255 * value) for value in FILL)


def smooth(seed):
    """Smooth image with some noise, on which interpolation matters little and every operation changes something."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((pixels + generator.integers(-2, 3, pixels.shape)).clip(0, 255).astype(np.uint8))


def tensor(*images):
    return torch.stack([as_bytes(image) for image in images]).float() / 255


def affine(image, *source):
    a, b, c, d, e, f = source
    # Pillow counts from the corner of a pixel, the operations from its centre.
    data = (a, b, c + 0.5 - 0.5 * a - 0.5 * b, d, e, f + 0.5 - 0.5 * d - 0.5 * e)
    return image.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=FILL_BYTES)


def solarize_add(image, added):
    return image.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)


PILLOW = {
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
def test_an_operation_is_that_of_pillow(name, strength):
    constant_one = [] if name in GEOMETRIC else [Image.new("RGB", (SIDE, SIDE), (102, 102, 102))]
    images = [*map(smooth, range(3)), *constant_one]
    found = OPERATIONS[name](tensor(*images), torch.full((len(images),), strength), torch.tensor(FILL)) * 255
    difference = (found - tensor(*(PILLOW[name](image, strength) for image in images)) * 255).abs()
    if name in GEOMETRIC:
        # Pillow interpolates no pixel that lies half outside; there the two differ.
        assert difference.flatten().quantile(0.85) <= 1.5
        assert (difference.amax(1) > 4).float().mean() < 0.12
        moved = OPERATIONS[name](torch.zeros(2, 3, SIDE, SIDE), torch.tensor([0.9, -0.9]), torch.tensor(FILL))
        torch.testing.assert_close(moved.amax((-2, -1)), torch.tensor([FILL, FILL]))
    else:
        assert difference.max() <= 1.5


def test_draws_have_the_published_distribution():
    generator, count = torch.Generator().manual_seed(0), 20_000
    numbers = torch.rand(count, 6, generator=generator), torch.randn(count, 2, generator=generator)
    operations, strengths = draw_operations(AugmentationSettings(**RANDAUGMENT, randaugment_prob=0.5), *numbers)
    applied = operations >= 0
    assert abs(applied.float().mean() - 0.5) < 0.01
    shares = torch.bincount(operations[applied], minlength=len(OPERATIONS)) / applied.sum()
    assert (shares - 1 / len(OPERATIONS)).abs().max() < 0.006
    assert abs((operations[0] == operations[1])[applied.all(0)].float().mean() - 1 / 15) < 0.01
    magnitudes = strengths.abs() * 10
    assert magnitudes.max() <= 10
    # A clamp at two deviations takes E[max(z - 2, 0)] of them from the mean.
    clamped = math.exp(-2) / math.sqrt(2 * math.pi) - math.erfc(math.sqrt(2))
    assert abs(magnitudes.mean() - (9 - 0.5 * clamped)) < 0.01
    assert abs((strengths > 0).float().mean() - 0.5) < 0.01
