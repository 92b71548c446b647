"""Augmentation of a batch of images on its device: from bytes to normalised pixel values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nio_hf.recipe.settings import AugmentationSettings
from nio_hf.vision.processors import PixelFormat
from nio_hf.vision.rand_augment import apply_operations, draw_colors, draw_operations
from nio_hf.vision.samples import MAX_SEED, SEEDS, draw_seed

_BYTE = 255.0
_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = (0.3, 1 / 0.3)


class BatchAugmentation:
    """Scale, RandAugment, colour jitter, normalise, erase and mix, in the order of the published trainings.

    The draws of a sample depend on its seed alone, whatever batch and process it is in. The draws of mixing depend on
    the seed of the first sample of the batch.

    Args:
        pixels: Pixel format, with the mean and standard deviation of the result.
        settings: Augmentation of a recipe.
        classes: Number of classes.

    Attributes:
        fill: Colour in [0, 1] of places that come in from outside of an image.
    """

    def __init__(self, pixels: PixelFormat, settings: AugmentationSettings, classes: int) -> None:
        self._mean = torch.tensor(pixels.mean)[:, None, None]
        self._std = torch.tensor(pixels.std)[:, None, None]
        self._settings = settings
        self._classes = classes
        self.fill = tuple(_byte_near(mean) / _BYTE for mean in pixels.mean)

    @property
    def _mixes(self) -> bool:
        return self._settings.mixup_alpha > 0 or self._settings.cutmix_alpha > 0

    @property
    def is_random(self) -> bool:
        """Whether anything is drawn at random."""
        settings = self._settings
        has_operations = settings.randaugment_magnitude is not None
        return has_operations or settings.color_jitter > 0 or settings.random_erasing > 0 or self._mixes

    def __call__(self, batch: Mapping[str, Any], *, mix: bool = True) -> dict[str, Any]:
        """Return the batch with augmented images, and with mixed images and labels where the settings mix.

        Args:
            batch: Batch of `pixel_values`, bytes (B, 3, H, W), `labels` (B,), and `seeds` (B,), which the result lacks;
                without seeds torch's CPU generator draws some.
            mix: Whether mixing is allowed.
        """
        settings = self._settings
        images: Tensor = batch["pixel_values"].contiguous().to(torch.float32, copy=True).div_(_BYTE)
        labels = batch["labels"]
        others = {key: value for key, value in batch.items() if key != SEEDS}
        seeds: list[int] = []
        if self.is_random:
            seeds = batch[SEEDS].tolist() if SEEDS in batch else [draw_seed() for _ in labels]
        draws = _SampleRandom(seeds)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            if settings.randaugment_magnitude is not None:
                layers = settings.randaugment_layers
                operations = draw_operations(settings, draws.uniform(3 * layers), draws.normal(layers))
                images = apply_operations(images, operations, self.fill)
            if settings.color_jitter > 0:
                images = apply_operations(images, draw_colors(settings.color_jitter, draws.uniform(6)))
            images.sub_(self._mean.to(images.device)).div_(self._std.to(images.device))
            if settings.random_erasing > 0:
                _erase(images, settings.random_erasing, draws)
            if mix and self._mixes:
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(draws.seed(0))
                    images, labels = mix_batch(images, labels, settings, self._classes)
        return {**others, "pixel_values": images, "labels": labels}


class _SampleRandom:
    """Random generators on the CPU, one for each of B samples."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(self, count: int) -> Tensor:
        """Uniform numbers (B, count) in [0, 1)."""
        return torch.stack([torch.rand(count, generator=one, dtype=torch.float32) for one in self._generators])

    def normal(self, count: int) -> Tensor:
        """Standard normal numbers (B, count)."""
        return torch.stack([torch.randn(count, generator=one, dtype=torch.float32) for one in self._generators])

    def seed(self, sample: int) -> int:
        """Seed for another generator, drawn for a sample."""
        return int(torch.randint(MAX_SEED, (), generator=self._generators[sample]))


def _byte_near(mean: float) -> int:
    """Byte nearest to the mean of a channel, as published, but not the mean itself.

    The mean is 0 once normalised, and stays 0 in every layer of a Swin: each of its normalisations would multiply the
    gradient of such patches by 1 / sqrt(eps), about 300.
    """
    nearest = round(_BYTE * mean)
    return nearest + 1 if math.isclose(nearest, _BYTE * mean, abs_tol=1e-3) else nearest


def _erase(images: Tensor, probability: float, draws: _SampleRandom) -> None:
    """Fill a rectangle of some of the images (B, 3, H, W) with normal noise (arXiv 1708.04896)."""
    height, width = images.shape[-2:]
    noise = torch.Generator(images.device)
    low, high = map(math.log, _ERASED_ASPECT)
    for sample, (chosen, area, aspect, top, left) in enumerate(draws.uniform(5).tolist()):
        if chosen >= probability:
            continue
        pixels = height * width * (_ERASED_AREA[0] + area * (_ERASED_AREA[1] - _ERASED_AREA[0]))
        ratio = math.exp(low + aspect * (high - low))
        rows = min(max(round(math.sqrt(pixels * ratio)), 1), height)
        columns = min(max(round(math.sqrt(pixels / ratio)), 1), width)
        y, x = int(top * (height - rows + 1)), int(left * (width - columns + 1))
        images[sample, :, y : y + rows, x : x + columns].normal_(generator=noise.manual_seed(draws.seed(sample)))


def mix_batch(images: Tensor, labels: Tensor, settings: AugmentationSettings, classes: int) -> tuple[Tensor, Tensor]:
    """Mix by MixUp (arXiv 1710.09412) or CutMix (arXiv 1905.04899), one draw a batch as in the DeiT and Swin trainings.

    Sample i is mixed with sample B - 1 - i; its target is lambda e_i + (1 - lambda) e_(B-1-i), where e is one-hot and
    lambda ~ Beta(alpha, alpha), for CutMix corrected to the area that was kept. kornia, in contrast, draws the lambda
    of MixUp uniformly.

    Args:
        images: Images (B, C, H, W).
        labels: Integers (B,).
        settings: Alphas, probability of mixing, and probability of CutMix where both are on.
        classes: Number of classes K.

    Returns:
        Mixed images (B, C, H, W) and targets (B, K), drawn from torch's CPU generator.
    """
    targets = functional.one_hot(labels, classes).to(images.dtype)
    if float(torch.rand(())) >= settings.mix_prob:
        return images, targets
    cuts = settings.cutmix_alpha > 0
    if cuts and settings.mixup_alpha > 0:
        cuts = float(torch.rand(())) < settings.mix_switch_prob
    alpha = torch.tensor(settings.cutmix_alpha if cuts else settings.mixup_alpha)
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    if not cuts:
        images = share * images + (1 - share) * images.flip(0)
    else:
        # A box with the aspect of the image and an area of 1 - share of it.
        height, width = images.shape[-2:]
        (top, bottom), (left, right) = (_random_span(limit, math.sqrt(1 - share)) for limit in (height, width))
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
        images, share = mixed, 1 - (bottom - top) * (right - left) / (height * width)
    return images, share * targets + (1 - share) * targets.flip(0)


def _random_span(limit: int, share: float) -> tuple[int, int]:
    """Ends of a span of a share of [0, limit), around a uniform middle and cut at the edges."""
    middle, half = int(torch.randint(limit, ())), int(limit * share) // 2
    return max(0, middle - half), min(limit, middle + half)
