"""MixUp and CutMix: the share that pixels show is the share that targets say, drawn from a Beta distribution."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from nio_hf.vision.mixing import Mixing

CLASSES = 7


def mixing(**changes: float) -> Mixing:
    return Mixing(CLASSES, **{"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 1.0, "switch_prob": 0.5, **changes})


def mixup(alpha: float = 0.8, prob: float = 1.0) -> Mixing:
    return mixing(mixup_alpha=alpha, cutmix_alpha=0.0, prob=prob)


def cutmix(alpha: float = 1.0, prob: float = 1.0) -> Mixing:
    return mixing(mixup_alpha=0.0, cutmix_alpha=alpha, prob=prob)


def constant(size: int, side: int = 16, width: int | None = None) -> Tensor:
    """Image i is i everywhere, so that pixels show what they were mixed of."""
    return torch.arange(size, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, side, width or side).clone()


def shares_of(mixed: Mixing, draws: int) -> Tensor:
    """lambda of many draws, as the targets of two samples say it."""
    images, labels = constant(2, 2), torch.tensor([0, 1])
    return torch.stack([mixed(images, labels)[1][0, 0] for _ in range(draws)])


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 3.0])
def test_the_share_of_mixup_is_beta_distributed(alpha: float) -> None:
    torch.manual_seed(0)
    shares = shares_of(mixup(alpha), 2500).double()
    assert abs(shares.mean() - 0.5) < 0.02
    assert abs(shares.var() - 1 / (4 * (2 * alpha + 1))) < 0.01
    assert stats.kstest(shares.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.001


def beta_moment(alpha: float, power: float) -> float:
    """E[a^power] of a ~ Beta(alpha, alpha)."""
    terms = (alpha + power, 2 * alpha, alpha, 2 * alpha + power)
    first, second, third, fourth = map(math.lgamma, terms)
    return math.exp(first + second - third - fourth)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_the_share_that_cutmix_takes_is_that_of_a_beta_distributed_box_cut_at_the_edges(alpha: float) -> None:
    torch.manual_seed(0)
    images, labels = constant(2, 256)[:, :1], torch.tensor([0, 1])
    taken = torch.stack([1 - cutmix(alpha)(images, labels)[1][0, 0] for _ in range(1500)]).double()
    # Around a uniform centre, a side s keeps s - s^2 / 4 of itself on average, and its square s^2 - 5/12 s^3.
    mean = beta_moment(alpha, 1) - beta_moment(alpha, 1.5) / 2 + beta_moment(alpha, 2) / 16
    square = beta_moment(alpha, 2) - 5 / 6 * beta_moment(alpha, 2.5) + 25 / 144 * beta_moment(alpha, 3)
    assert abs(taken.mean() - mean) < 0.015
    assert abs(taken.var() - (square - mean**2)) < 0.01


@pytest.mark.parametrize("size", [2, 3, 8, 9])
@pytest.mark.parametrize("make", [mixup, cutmix, mixing])
def test_targets_match_the_pixels_and_sum_to_one(make: type, size: int) -> None:
    torch.manual_seed(1)
    images, labels = constant(size), torch.arange(size) % CLASSES
    for _ in range(30):
        pixels, targets = make()(images, labels)
        assert pixels.shape == images.shape
        torch.testing.assert_close(targets.sum(1), torch.ones(size))
        for row in range(size):
            partner = size - 1 - row
            shown = float(pixels[row].mean())
            share = 1.0 if row == partner else (shown - partner) / (row - partner)
            wanted = torch.zeros(CLASSES)
            wanted[labels[row]] += share
            wanted[labels[partner]] += 1 - share
            torch.testing.assert_close(targets[row], wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (15, 15), (7, 31), (1, 1), (224, 9)])
def test_cutmix_puts_a_box_of_the_partner_into_each_image_at_one_place(height: int, width: int) -> None:
    torch.manual_seed(2)
    images, labels = constant(6, height, width), torch.arange(6)
    for _ in range(40):
        pixels, targets = cutmix()(images, labels)
        assert torch.equal(pixels[:, :1].expand_as(pixels), pixels)
        cut = [pixels[row, 0] == 5 - row for row in range(6)]
        assert all(torch.equal(mask, cut[0]) for mask in cut)
        rows, columns = cut[0].any(1), cut[0].any(0)
        assert torch.equal(cut[0], rows[:, None] & columns[None])
        for edges in (rows, columns):
            places = edges.nonzero().flatten()
            assert len(places) == 0 or len(places) == places.max() - places.min() + 1
        torch.testing.assert_close(targets[0, 0], 1 - cut[0].float().mean())


def test_cutmix_boxes_reach_every_pixel_and_have_the_aspect_of_the_image() -> None:
    torch.manual_seed(3)
    images, labels = constant(2, 12, 36), torch.tensor([0, 1])
    seen = torch.zeros(12, 36)
    for _ in range(400):
        cut = cutmix()(images, labels)[0][0, 0] == 1
        seen += cut
        rows, columns = int(cut.any(1).sum()), int(cut.any(0).sum())
        touches = cut[0].any() or cut[-1].any() or cut[:, 0].any() or cut[:, -1].any()
        if rows and not touches:
            assert abs(columns - 3 * rows) <= 4
    assert seen.min() > 0


def test_the_partner_is_the_reversed_batch() -> None:
    torch.manual_seed(4)
    images, labels = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4])
    pixels, targets = mixup()(images, labels)
    share = float(targets[0, 0])
    torch.testing.assert_close(pixels, share * images + (1 - share) * images.flip(0))
    assert targets[2, 2] == 1
    assert (targets[:, :5] > 0).sum() == 9


def test_a_batch_is_mixed_with_one_share() -> None:
    torch.manual_seed(5)
    for _ in range(20):
        targets = mixing()(constant(6), torch.arange(6))[1]
        torch.testing.assert_close(targets.diagonal()[:6], targets[0, 0].expand(6))


@pytest.mark.parametrize("make", [mixup, cutmix])
def test_a_batch_of_one_stays_as_it_is(make: type) -> None:
    torch.manual_seed(6)
    images, labels = torch.randn(1, 3, 8, 8), torch.tensor([3])
    for _ in range(20):
        pixels, targets = make()(images, labels)
        torch.testing.assert_close(pixels, images)
        torch.testing.assert_close(targets, torch.eye(CLASSES)[labels])


@pytest.mark.parametrize("make", [mixup, cutmix, mixing])
def test_the_images_and_labels_that_are_given_are_not_modified(make: type) -> None:
    torch.manual_seed(7)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    copies = images.clone(), labels.clone()
    for _ in range(10):
        make()(images, labels)
        assert torch.equal(images, copies[0])
        assert torch.equal(labels, copies[1])


@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_as_many_batches_are_mixed_as_the_probability_says(prob: float) -> None:
    torch.manual_seed(8)
    images, labels = constant(2, 32), torch.tensor([0, 1])
    one_hot = torch.eye(CLASSES)[labels]
    mixed = []
    for _ in range(600):
        pixels, targets = mixup(2.0, prob)(images, labels)
        mixed.append(not torch.equal(targets, one_hot))
        assert torch.equal(pixels, images) is not mixed[-1]
        assert targets.dtype == torch.float32
    assert abs(sum(mixed) / 600 - prob) < 0.06
    assert prob not in (0.0, 1.0) or sum(mixed) == 600 * prob


@pytest.mark.parametrize("switch_prob", [0.0, 0.3, 1.0])
def test_cutmix_is_chosen_as_often_as_the_switch_says_where_both_are_on(switch_prob: float) -> None:
    torch.manual_seed(9)
    images, labels = constant(2, 32), torch.tensor([0, 1])
    mixed = mixing(mixup_alpha=2.0, switch_prob=switch_prob)
    # A blend of 0 and 1 is neither; a box leaves both as they are.
    cut = [bool(((pixels == 0) | (pixels == 1)).all()) for pixels, _ in (mixed(images, labels) for _ in range(600))]
    assert abs(sum(cut) / 600 - switch_prob) < 0.06


def test_the_switch_means_nothing_where_one_is_off() -> None:
    torch.manual_seed(10)
    images, labels = constant(2, 32), torch.tensor([0, 1])
    for switch_prob in (0.0, 1.0):
        for mixed, cuts in (
            (mixing(mixup_alpha=2.0, cutmix_alpha=0.0, switch_prob=switch_prob), False),
            (mixing(mixup_alpha=0.0, switch_prob=switch_prob), True),
        ):
            for _ in range(20):
                pixels, _ = mixed(images, labels)
                assert bool(((pixels == 0) | (pixels == 1)).all()) is cuts


def test_samples_of_one_class_keep_it_whole() -> None:
    torch.manual_seed(11)
    for _ in range(20):
        targets = mixing()(constant(4), torch.full((4,), 2))[1]
        torch.testing.assert_close(targets, torch.eye(CLASSES)[[2, 2, 2, 2]])


def test_draws_come_from_the_seed_of_torch() -> None:
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)

    def drawn(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return mixing()(images, labels)

    for first, second in zip(drawn(0), drawn(0), strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(drawn(0)[1], drawn(1)[1])


@pytest.mark.parametrize("alpha", [0.01, 0.1, 100.0])
def test_no_alpha_makes_numbers_that_are_not_finite(alpha: float) -> None:
    torch.manual_seed(12)
    for _ in range(200):
        for make in (mixup, cutmix):
            pixels, targets = make(alpha)(constant(2, 4), torch.tensor([0, 1]))
            assert pixels.isfinite().all()
            assert (targets >= 0).all()
            assert targets.sum() == pytest.approx(2)
