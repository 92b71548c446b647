"""MixUp and CutMix of a batch with itself, which turn its labels into probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


class Mixing:
    """MixUp (arXiv 1710.09412) or CutMix (arXiv 1905.04899), one draw a batch as in the DeiT and Swin trainings.

    Sample i is mixed with sample B - 1 - i; its target is lambda e_i + (1 - lambda) e_(B-1-i), where e is one-hot and
    lambda ~ Beta(alpha, alpha), for CutMix corrected to the area that was kept. kornia draws the lambda of MixUp
    uniformly, hence our own.

    Args:
        classes: number of classes.
        mixup_alpha: 0 for no MixUp.
        cutmix_alpha: 0 for no CutMix.
        prob: probability of mixing a batch.
        switch_prob: probability of CutMix where both are on.
    """

    def __init__(
        self, classes: int, *, mixup_alpha: float, cutmix_alpha: float, prob: float, switch_prob: float
    ) -> None:
        self._classes = classes
        self._mixup_alpha = mixup_alpha
        self._cutmix_alpha = cutmix_alpha
        self._prob = prob
        self._switch_prob = switch_prob

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(mixed images (B, C, H, W), targets (B, classes)), drawn from torch's CPU generator.

        Args:
            images: (B, C, H, W).
            labels: (B,) integers.
        """
        targets = functional.one_hot(labels, self._classes).to(images.dtype)
        if float(torch.rand(())) >= self._prob:
            return images, targets
        both = self._mixup_alpha > 0 and self._cutmix_alpha > 0
        cuts = float(torch.rand(())) < self._switch_prob if both else self._cutmix_alpha > 0
        alpha = torch.tensor(self._cutmix_alpha if cuts else self._mixup_alpha)
        share = float(torch.distributions.Beta(alpha, alpha).sample())
        if cuts:
            images, share = _cut(images, share)
        else:
            images = share * images + (1 - share) * images.flip(0)
        return images, share * targets + (1 - share) * targets.flip(0)


def _cut(images: Tensor, share: float) -> tuple[Tensor, float]:
    """(images with a box of their partner, share of the area that was kept).

    The box has the image's aspect and an area of 1 - `share` of it; its centre is uniform, and it is
    clipped to the image.
    """
    height, width = images.shape[-2:]
    side = math.sqrt(1 - share)
    middle_y, middle_x = int(torch.randint(height, ())), int(torch.randint(width, ()))
    top, bottom = _clipped(middle_y, int(height * side), height)
    left, right = _clipped(middle_x, int(width * side), width)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _clipped(middle: int, length: int, limit: int) -> tuple[int, int]:
    return max(0, middle - length // 2), min(limit, middle + length // 2)
