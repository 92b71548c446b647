"""RandAugment and colour jitter, with operations and strengths drawn for each sample, on the device of the images.

Source: Cubuk et al. 2020, arXiv 1909.13719, with the operations and ranges of the DeiT and Swin trainings
("rand-m9-mstd0.5-inc1"). Each operation grows more severe with the magnitude and is drawn with replacement. kornia's
RandAugment draws one operation for a whole batch; this one draws kornia's operations for each sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from kornia import enhance
from kornia.geometry.transform import warp_affine
from torch import Tensor

from nio_hf.recipe.settings import AugmentationSettings

Draws = tuple[Tensor, Tensor]
"""Indices (N, B) into `OPERATIONS`, or -1 for none, and strengths (N, B): magnitude / 10 with a random sign."""
_Operation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function from images (n, 3, H, W) in [0, 1], signed strengths (n,) in [-1, 1] and fill (3,) to images."""

_BYTE = 255.0
_MAX_RADIANS = math.radians(30)
_MAX_SHEAR = 0.3
_MAX_TRANSLATION = 0.45
_MAX_ENHANCEMENT = 0.9
_MAX_SOLARIZE_ADD = 110.0
_LEVELS = 10.0
_COLORS = ("brightness", "contrast", "color")


def draw_operations(settings: AugmentationSettings, uniform: Tensor, normal: Tensor) -> Draws:
    """Draw the operations of RandAugment on B images.

    Args:
        settings: Magnitude and its deviation, layers N and probability.
        uniform: Uniform numbers (B, 3 N) in [0, 1).
        normal: Standard normal numbers (B, N).
    """
    chosen, applied, sign = uniform.T.chunk(3)
    operations = torch.where(applied < settings.randaugment_prob, (chosen * len(OPERATIONS)).long(), -1)
    magnitudes = (settings.randaugment_magnitude or 0.0) + settings.randaugment_magnitude_std * normal.T
    return operations, magnitudes.clamp(0, _LEVELS) / _LEVELS * torch.where(sign < 0.5, -1.0, 1.0)


def draw_colors(strength: float, uniform: Tensor) -> Draws:
    """Draw brightness, contrast and saturation in random order, factors in 1 +- `strength`, from `uniform` (B, 6)."""
    order, factors = uniform.chunk(2, dim=1)
    operations = torch.tensor([list(OPERATIONS).index(name) for name in _COLORS])[order.argsort(dim=1)]
    return operations.T, (strength * (2 * factors - 1) / _MAX_ENHANCEMENT).T


def apply_operations(images: Tensor, draws: Draws, fill: tuple[float, ...] = (0.0, 0.0, 0.0)) -> Tensor:
    """Apply draws to images (B, 3, H, W) in [0, 1]: in each layer, each operation to all images that drew it at once.

    `fill` is the colour of places that come in from outside of an image.
    """
    colour = torch.tensor(fill, device=images.device, dtype=images.dtype)
    for operations, strengths in zip(*draws, strict=True):
        augmented = images.clone()
        for number, operation in enumerate(OPERATIONS.values()):
            chosen = (operations == number).nonzero().flatten()
            if len(chosen):
                rows, strength = chosen.to(images.device), strengths[chosen].to(images.device, images.dtype)
                augmented[rows] = operation(images[rows], strength, colour)
        images = augmented
    return images


def _in_bytes(images: Tensor) -> Tensor:
    return (images * _BYTE).round()


def _steps(strength: Tensor, count: float) -> Tensor:
    """Whole number of steps up to `count`, for each image."""
    return (strength.abs() * count).floor()[:, None, None, None]


def _auto_contrast(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    lowest, highest = images.amin((-2, -1), keepdim=True), images.amax((-2, -1), keepdim=True)
    return torch.where(highest > lowest, enhance.normalize_min_max(images, eps=0.0).nan_to_num(), images)


def _equalize(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    # kornia truncates x * 255, which may fall below the byte of x.
    return enhance.equalize((_in_bytes(images) / _BYTE + 0.1 / _BYTE).clamp(max=1.0))


def _posterize(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    dropped = 2.0 ** (4 + _steps(strength, 4))
    return (_in_bytes(images) / dropped).floor() * dropped / _BYTE


def _solarize(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    return torch.where(_in_bytes(images) < 256 - _steps(strength, 256), images, 1 - images)


def _solarize_add(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    added = _steps(strength, _MAX_SOLARIZE_ADD) / _BYTE
    return torch.where(_in_bytes(images) < 128, (images + added).clamp(max=1.0), images)


def _enhance_by(function: Callable[[Tensor, Tensor], Tensor]) -> _Operation:
    return lambda images, strength, fill: function(images, 1 + _MAX_ENHANCEMENT * strength)


def _rotate(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    cos, sin = (strength * _MAX_RADIANS).cos(), (strength * _MAX_RADIANS).sin()
    x, y = (images.shape[-1] - 1) / 2, (images.shape[-2] - 1) / 2
    return _warp(images, fill, a=cos, b=-sin, c=x - x * cos + y * sin, d=sin, e=cos, f=y - x * sin - y * cos)


def _warp(images: Tensor, fill: Tensor, **source: Tensor) -> Tensor:
    """Images whose pixel (x, y) comes from (a x + b y + c, d x + e y + f); a = e = 1 and others 0, where not given."""
    to_source = torch.eye(3, dtype=images.dtype, device=images.device).repeat(len(images), 1, 1)
    for name, values in source.items():
        to_source.view(-1, 9)[:, "abcdef".index(name)] = values
    size = (images.shape[-2], images.shape[-1])
    return warp_affine(images, torch.linalg.inv(to_source)[:, :2], size, padding_mode="fill", fill_value=fill)


OPERATIONS: dict[str, _Operation] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": lambda images, strength, fill: enhance.invert(images),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhance_by(enhance.adjust_saturation_with_gray_subtraction),
    "contrast": _enhance_by(enhance.adjust_contrast_with_mean_subtraction),
    "brightness": _enhance_by(enhance.adjust_brightness_accumulative),
    "sharpness": _enhance_by(enhance.sharpness),
    "shear_x": lambda images, strength, fill: _warp(images, fill, b=_MAX_SHEAR * strength),
    "shear_y": lambda images, strength, fill: _warp(images, fill, d=_MAX_SHEAR * strength),
    "translate_x": lambda images, s, fill: _warp(images, fill, c=_MAX_TRANSLATION * images.shape[-1] * s),
    "translate_y": lambda images, s, fill: _warp(images, fill, f=_MAX_TRANSLATION * images.shape[-2] * s),
}
"""Operations of the published trainings, by name."""
