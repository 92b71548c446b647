"""RandAugment with its operations and magnitudes drawn for each sample, on the device of the images.

Source: Cubuk et al. 2020, arXiv 1909.13719. The set of operations and their ranges are those of the DeiT and Swin
trainings ("rand-m9-mstd0.5-inc1"): each grows more severe with the magnitude, drawn with replacement.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from kornia import enhance
from kornia.geometry.transform import warp_affine
from torch import Tensor

from nio_hf.vision.sample_random import SampleRandom

_Operation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images (n, 3, H, W) in [0, 1], signed strength (n,) in [-1, 1], fill (3,)) to images of the same shape."""

_BYTE = 255.0
_MAX_DEGREES = 30.0
_MAX_SHEAR = 0.3
_MAX_TRANSLATION = 0.45
_MAX_ENHANCEMENT = 0.9
_MAX_SOLARIZE_ADD = 110.0
_LEVELS = 10.0
_COLORS = ("brightness", "contrast", "color")


@dataclasses.dataclass(frozen=True)
class Draws:
    """What is done to each of B images in each of N layers.

    Attributes:
        operations: (N, B), index into `OPERATIONS`, or -1 for nothing.
        strengths: (N, B), magnitude / 10 with a random sign.
    """

    operations: Tensor
    strengths: Tensor


class RandAugment:
    """N random operations on each image.

    Args:
        magnitude: M, out of 10.
        magnitude_std: standard deviation of the M of an operation.
        layers: N.
        prob: probability of each operation.
        fill: (3,) colour of what comes in from outside the image.
    """

    def __init__(
        self, *, magnitude: float, magnitude_std: float, layers: int, prob: float, fill: tuple[float, ...]
    ) -> None:
        self._magnitude = magnitude
        self._magnitude_std = magnitude_std
        self._layers = layers
        self._prob = prob
        self._fill = fill

    def __call__(self, images: Tensor, random: SampleRandom) -> Tensor:
        """Augmented images (B, 3, H, W) in [0, 1], of images likewise."""
        return self.apply(images, self.draw(random))

    def draw(self, random: SampleRandom) -> Draws:
        """Draw the operations and strengths of B images."""
        chosen, applied, sign = random.uniform(3 * self._layers).T.chunk(3)
        operations = torch.where(applied < self._prob, (chosen * len(OPERATIONS)).long(), -1)
        magnitudes = self._magnitude + self._magnitude_std * random.normal(self._layers).T
        strengths = magnitudes.clamp(0, _LEVELS) / _LEVELS * torch.where(sign < 0.5, -1.0, 1.0)
        return Draws(operations, strengths)

    def apply(self, images: Tensor, draws: Draws) -> Tensor:
        """Apply what was drawn."""
        return apply_operations(images, draws, self._fill)


class ColorJitter:
    """Brightness, contrast and saturation of each image, in a random order, times factors in 1 +- the strength.

    Args:
        strength: in [0, 1].
    """

    def __init__(self, strength: float) -> None:
        self._strength = strength

    def __call__(self, images: Tensor, random: SampleRandom) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] with other colours."""
        order, factors = random.uniform(2 * len(_COLORS)).chunk(2, dim=1)
        operations = torch.tensor([list(OPERATIONS).index(name) for name in _COLORS])[order.argsort(dim=1)]
        strengths = self._strength * (2 * factors - 1) / _MAX_ENHANCEMENT
        return apply_operations(images, Draws(operations.T, strengths.T), (0.0, 0.0, 0.0))


def apply_operations(images: Tensor, draws: Draws, fill: tuple[float, ...]) -> Tensor:
    """Images (B, 3, H, W) after what was drawn: per layer, each operation at once to all images that drew it.

    Args:
        images: in [0, 1].
        draws: of B images.
        fill: (3,) colour of what comes in from outside the image.
    """
    colour = torch.tensor(fill, device=images.device, dtype=images.dtype)
    for operations, strengths in zip(draws.operations, draws.strengths, strict=True):
        augmented = images.clone()
        for number, operation in enumerate(OPERATIONS.values()):
            chosen = (operations == number).nonzero().flatten()
            if len(chosen):
                rows, strength = chosen.to(images.device), strengths[chosen].to(images.device, images.dtype)
                augmented[rows] = operation(images[rows], strength, colour)
        images = augmented
    return images


def _auto_contrast(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    lowest, highest = images.amin((-2, -1), keepdim=True), images.amax((-2, -1), keepdim=True)
    return torch.where(highest > lowest, enhance.normalize_min_max(images, eps=0.0).nan_to_num(), images)


def _equalize(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    # kornia truncates x * 255, which falls below the byte that x was made of.
    return enhance.equalize(((images * _BYTE).round() / _BYTE + 0.1 / _BYTE).clamp(max=1.0))


def _invert(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    return enhance.invert(images)


def _posterize(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    dropped = 2.0 ** (4 + (strength.abs() * 4).floor())[:, None, None, None]
    return ((images * _BYTE).round() / dropped).floor() * dropped / _BYTE


def _solarize(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    threshold = (256 - (strength.abs() * 256).floor())[:, None, None, None]
    return torch.where((images * _BYTE).round() < threshold, images, 1 - images)


def _solarize_add(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    added = (strength.abs() * _MAX_SOLARIZE_ADD).floor()[:, None, None, None] / _BYTE
    return torch.where((images * _BYTE).round() < 128, (images + added).clamp(max=1.0), images)


def _color(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    return enhance.adjust_saturation_with_gray_subtraction(images, 1 + _MAX_ENHANCEMENT * strength)


def _contrast(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    return enhance.adjust_contrast_with_mean_subtraction(images, 1 + _MAX_ENHANCEMENT * strength)


def _brightness(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    return enhance.adjust_brightness_accumulative(images, 1 + _MAX_ENHANCEMENT * strength)


def _sharpness(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    return enhance.sharpness(images, 1 + _MAX_ENHANCEMENT * strength)


def _rotate(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    angle = strength * (_MAX_DEGREES * math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    x, y = (images.shape[-1] - 1) / 2, (images.shape[-2] - 1) / 2
    return _warp(images, fill, cos, -sin, x - x * cos + y * sin, sin, cos, y - x * sin - y * cos)


def _shear_x(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    one, zero = torch.ones_like(strength), torch.zeros_like(strength)
    return _warp(images, fill, one, _MAX_SHEAR * strength, zero, zero, one, zero)


def _shear_y(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    one, zero = torch.ones_like(strength), torch.zeros_like(strength)
    return _warp(images, fill, one, zero, zero, _MAX_SHEAR * strength, one, zero)


def _translate_x(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    one, zero = torch.ones_like(strength), torch.zeros_like(strength)
    return _warp(images, fill, one, zero, _MAX_TRANSLATION * images.shape[-1] * strength, zero, one, zero)


def _translate_y(images: Tensor, strength: Tensor, fill: Tensor) -> Tensor:
    one, zero = torch.ones_like(strength), torch.zeros_like(strength)
    return _warp(images, fill, one, zero, zero, zero, one, _MAX_TRANSLATION * images.shape[-2] * strength)


def _warp(images: Tensor, fill: Tensor, *source: Tensor) -> Tensor:
    """Images whose pixel (x, y) comes from (a x + b y + c, d x + e y + f), for a to f of shape (n,)."""
    last = torch.zeros_like(source[0]), torch.zeros_like(source[0]), torch.ones_like(source[0])
    to_source = torch.stack([*source, *last], dim=-1).view(-1, 3, 3)
    to_target = torch.linalg.inv(to_source)[:, :2]
    size = (images.shape[-2], images.shape[-1])
    return warp_affine(images, to_target, size, padding_mode="fill", fill_value=fill)


OPERATIONS: dict[str, _Operation] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
"""The operations of the published trainings, by name."""
