"""What training does to a batch on its device: scaled, augmented, normalised, erased and mixed, sample by sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nio_hf.vision.augmentation import BatchAugmentation
from nio_hf.vision.mixing import Mixing
from nio_hf.vision.processors import PixelFormat
from nio_hf.vision.rand_augment import RandAugment
from nio_hf.vision.sample_random import SampleRandom

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PIXELS = PixelFormat(16, 16, MEAN, STD, Image.Resampling.BILINEAR, keeps=True)
CLASSES = 5


def mixing() -> Mixing:
    return Mixing(CLASSES, mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5)


def rand_augment() -> RandAugment:
    return RandAugment(magnitude=9, magnitude_std=0.5, layers=2, prob=0.5, fill=MEAN)


EVERYTHING: dict[str, Any] = {
    "rand_augment": rand_augment(),
    "color_jitter": 0.4,
    "random_erasing": 0.5,
    "mixing": mixing(),
}
EACH = [{}, *({key: value} for key, value in EVERYTHING.items()), EVERYTHING]


def batch(size: int = 8, side: int = 16, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (size, 3, side, side), generator=generator, dtype=torch.uint8)
    return {"pixel_values": images, "labels": torch.arange(size) % CLASSES}


def normalised(images: Tensor) -> Tensor:
    return (images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def in_unit(pixels: Tensor) -> Tensor:
    """Normalised pixels as they were in [0, 1]."""
    return pixels * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def test_images_are_only_scaled_and_normalised_where_everything_is_off() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    given = batch()
    found = BatchAugmentation(PIXELS)(given)
    torch.testing.assert_close(found["pixel_values"].double(), normalised(given["pixel_values"]), atol=1e-6, rtol=1e-6)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("settings", EACH)
def test_bytes_become_floats_of_the_same_shape(settings: dict[str, Any]) -> None:
    for size, side in ((8, 16), (1, 16), (3, 8), (2, 33)):
        found = BatchAugmentation(PIXELS, **settings)(batch(size, side))
        assert found["pixel_values"].dtype == torch.float32
        assert found["pixel_values"].shape == (size, 3, side, side)
        assert found["pixel_values"].isfinite().all()


@pytest.mark.parametrize("settings", EACH)
def test_the_batch_that_is_given_is_not_modified_and_its_other_keys_are_kept(settings: dict[str, Any]) -> None:
    given = {**batch(), "weights": torch.ones(8), "name": "batch"}
    found = BatchAugmentation(PIXELS, **settings)(given)
    assert given.keys() == found.keys()
    assert found["weights"] is given["weights"]
    assert found["name"] == "batch"
    for key, value in batch().items():
        assert torch.equal(given[key], value)


@pytest.mark.parametrize("settings", EACH)
def test_labels_stay_integers_unless_they_are_mixed(settings: dict[str, Any]) -> None:
    augmentation = BatchAugmentation(PIXELS, **settings)
    for seed in range(5):
        torch.manual_seed(seed)
        assert torch.equal(augmentation(batch(), mix=False)["labels"], batch()["labels"])
        targets = augmentation(batch())["labels"]
        if "mixing" in settings:
            assert targets.shape == (8, CLASSES)
            torch.testing.assert_close(targets.sum(1), torch.ones(8))
        else:
            assert torch.equal(targets, batch()["labels"])


@pytest.mark.parametrize("settings", EACH[1:])
def test_what_is_drawn_depends_on_the_seed_of_torch_alone(settings: dict[str, Any]) -> None:
    augmentation = BatchAugmentation(PIXELS, **settings)

    def drawn(seed: int, other: int) -> Tensor:
        np.random.seed(other)
        torch.manual_seed(seed)
        pixels: Tensor = augmentation(batch())["pixel_values"]
        return pixels

    assert torch.equal(drawn(0, 0), drawn(0, 1))
    assert any(not torch.equal(drawn(0, 0), drawn(seed, 0)) for seed in range(1, 4))


def test_a_second_augmentation_of_the_same_settings_draws_the_same() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(BatchAugmentation(PIXELS, **EVERYTHING)(batch())["pixel_values"])
    assert torch.equal(found[0], found[1])


def test_a_sample_is_augmented_by_its_seed_whatever_batch_and_process_it_is_in() -> None:
    augmentation = BatchAugmentation(PIXELS, **{**EVERYTHING, "mixing": None})
    given = {**batch(12), "seeds": torch.arange(100, 112)}
    together = augmentation(given)
    assert "seeds" not in together
    for rows in (slice(0, 4), slice(4, 12), slice(7, 8)):
        torch.manual_seed(rows.start)
        alone = augmentation({key: value[rows] for key, value in given.items()})["pixel_values"]
        torch.testing.assert_close(alone, together["pixel_values"][rows])
    other = augmentation({**given, "seeds": torch.arange(12)})["pixel_values"]
    assert ((other - together["pixel_values"]).abs().flatten(1).amax(1) > 1e-3).all()


def test_a_batch_is_mixed_by_the_seed_of_its_first_sample_and_the_state_of_torch_left_alone() -> None:
    augmentation = BatchAugmentation(PIXELS, **EVERYTHING)
    given = {**batch(), "seeds": torch.arange(8)}
    before = torch.get_rng_state()
    first = augmentation(given)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    again = augmentation(given)
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert torch.equal(first["labels"], again["labels"])
    assert not torch.equal(augmentation({**given, "seeds": torch.arange(1, 9)})["labels"], first["labels"])


def test_nothing_is_recorded_for_a_gradient_and_lower_precision_around_changes_nothing() -> None:
    augmentation = BatchAugmentation(PIXELS, **EVERYTHING)
    torch.manual_seed(0)
    plain = augmentation(batch())["pixel_values"]
    assert not plain.requires_grad
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augmentation(batch())["pixel_values"], plain)


# Colour jitter


def test_each_sample_draws_its_own_colours() -> None:
    torch.manual_seed(0)
    given = {"pixel_values": batch(1)["pixel_values"].repeat(16, 1, 1, 1), "labels": torch.zeros(16, dtype=torch.long)}
    found = BatchAugmentation(PIXELS, color_jitter=0.4)(given)["pixel_values"]
    assert len({image.numpy().tobytes() for image in found}) == 16


def test_colours_change_more_with_the_strength_and_stay_colours() -> None:
    changes = []
    for strength in (0.05, 0.2, 0.8):
        torch.manual_seed(1)
        found = BatchAugmentation(PIXELS, color_jitter=strength)(batch(64))["pixel_values"]
        colours = in_unit(found)
        assert colours.min() > -1e-5
        assert colours.max() < 1 + 1e-5
        changes.append(float((found - normalised(batch(64)["pixel_values"])).abs().mean()))
    assert changes == sorted(changes)
    assert changes[0] > 0
    assert changes[1] > 2 * changes[0]


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_a_grey_image_is_only_made_lighter_or_darker_within_the_strength(strength: float) -> None:
    torch.manual_seed(2)
    given = {"pixel_values": torch.full((500, 3, 4, 4), 100, dtype=torch.uint8), "labels": torch.zeros(500).long()}
    found = in_unit(BatchAugmentation(PIXELS, color_jitter=strength)(given)["pixel_values"])
    torch.testing.assert_close(found, found[:, :1, :1, :1].expand_as(found), atol=1e-5, rtol=0)
    factors = found[:, 0, 0, 0] / (100 / 255)
    assert factors.min() >= 1 - strength - 1e-4
    assert factors.max() <= 1 + strength + 1e-4
    assert abs(factors.mean() - 1) < 0.06
    assert abs(factors.std() - strength / 3**0.5) < 0.04


# Random erasing


def erased_of(probability: float, size: int, side: int) -> tuple[Tensor, Tensor]:
    """(images with random erasing, which of their pixels (size, side, side) changed)."""
    torch.manual_seed(0)
    given = batch(size, side)
    found = BatchAugmentation(PIXELS, random_erasing=probability)(given)["pixel_values"]
    plain = BatchAugmentation(PIXELS)(given)["pixel_values"]
    return found, (found != plain).any(1)


@pytest.mark.parametrize("probability", [0.25, 1.0])
def test_as_many_samples_are_erased_as_the_probability_says(probability: float) -> None:
    _, erased = erased_of(probability, 1000, 16)
    share = erased.flatten(1).any(1).float().mean()
    assert abs(share - probability) < 0.05
    assert probability < 1 or share == 1


def rectangle(mask: Tensor) -> tuple[int, int]:
    """Height and width of the box around the pixels of a mask."""
    return int(mask.any(1).nonzero().max() - mask.any(1).nonzero().min()) + 1, int(
        mask.any(0).nonzero().max() - mask.any(0).nonzero().min()
    ) + 1


def test_what_is_erased_is_a_rectangle_of_the_published_area_and_aspect() -> None:
    side = 64
    _, erased = erased_of(1.0, 400, side)
    shares, aspects = [], []
    for mask in erased:
        height, width = rectangle(mask)
        assert int(mask.sum()) == height * width
        shares.append(height * width / side**2)
        aspects.append(height / width)
    assert 0.01 < min(shares) < 0.04
    assert 0.28 < max(shares) < 0.36
    assert abs(np.mean(shares) - (0.02 + 1 / 3) / 2) < 0.02
    assert min(aspects) < 0.5
    assert max(aspects) > 2
    assert min(aspects) > 0.2
    assert max(aspects) < 5
    assert abs(np.mean(np.log(aspects))) < 0.2


def test_a_rectangle_is_filled_with_normal_noise_that_differs_between_pixels_channels_and_samples() -> None:
    found, erased = erased_of(1.0, 200, 32)
    noise = torch.stack([found[:, channel][erased] for channel in range(3)])
    assert noise.shape[1] > 20_000
    for channel in noise:
        assert abs(channel.mean()) < 0.02
        assert abs(channel.std() - 1) < 0.02
    assert (torch.corrcoef(noise) - torch.eye(3)).abs().max() < 0.02
    assert noise.flatten().unique().numel() > 0.99 * noise.numel()


def test_rectangles_lie_anywhere_and_differ_between_samples() -> None:
    _, erased = erased_of(1.0, 1000, 16)
    assert erased.any(0).all()
    assert len({mask.numpy().tobytes() for mask in erased}) > 500


def test_what_is_outside_of_the_rectangle_is_what_it_was() -> None:
    found, erased = erased_of(0.5, 100, 16)
    plain = BatchAugmentation(PIXELS)(batch(100, 16))["pixel_values"]
    kept = ~erased[:, None].expand_as(found)
    assert torch.equal(found[kept], plain[kept])


# The order


def test_erased_rectangles_are_noise_after_normalisation_and_before_mixing() -> None:
    torch.manual_seed(0)
    both = BatchAugmentation(
        PIXELS, random_erasing=1.0, mixing=Mixing(CLASSES, mixup_alpha=0.0, cutmix_alpha=1.0, prob=1.0, switch_prob=0.0)
    )
    given = {"pixel_values": torch.full((64, 3, 16, 16), 255, dtype=torch.uint8), "labels": torch.zeros(64).long()}
    found = both(given)["pixel_values"]
    white = normalised(given["pixel_values"]).float()
    noise = found[(found - white).abs() > 1e-4]
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


def test_rand_augment_sees_images_in_the_unit_range() -> None:
    seen = []

    class Watching(RandAugment):
        def __call__(self, images: Tensor, random: SampleRandom) -> Tensor:
            seen.append(images.clone())
            return images

    given = batch()
    watching = Watching(magnitude=9, magnitude_std=0, layers=1, prob=1, fill=MEAN)
    found = BatchAugmentation(PIXELS, rand_augment=watching)(given)["pixel_values"]
    torch.testing.assert_close(seen[0], given["pixel_values"] / 255)
    torch.testing.assert_close(found.double(), normalised(given["pixel_values"]), atol=1e-6, rtol=1e-6)


def test_rand_augment_changes_about_as_many_samples_as_its_probability_says() -> None:
    torch.manual_seed(0)
    augment = RandAugment(magnitude=9, magnitude_std=0, layers=1, prob=0.5, fill=MEAN)
    given = batch(400)
    found = BatchAugmentation(PIXELS, rand_augment=augment)(given)["pixel_values"]
    changed = (found - normalised(given["pixel_values"])).abs().flatten(1).amax(1) > 1e-3
    assert 0.4 < changed.float().mean() < 0.55


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_pixels_are_made_in_full_precision_whatever_the_default_of_the_model_is(name: str) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        found = BatchAugmentation(PIXELS)(batch())["pixel_values"]
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32
