"""The cross-entropy against its formula in fp64, and micro-batches against the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nio_hf.vision.losses import classification_loss
from nio_hf.vision.samples import IGNORED_LABEL

BATCH, CLASSES = 12, 5
SMOOTHINGS = [0.0, 0.1, 1.0]


def drawn_logits(seed: int = 0, size: int = BATCH) -> Tensor:
    return 3 * torch.randn(size, CLASSES, generator=torch.Generator().manual_seed(seed))


def hard(seed: int = 1, size: int = BATCH) -> Tensor:
    return torch.randint(CLASSES, (size,), generator=torch.Generator().manual_seed(seed))


def soft(seed: int = 2, size: int = BATCH) -> Tensor:
    return torch.randn(size, CLASSES, generator=torch.Generator().manual_seed(seed)).softmax(1)


def some_ignored() -> Tensor:
    labels = hard()
    labels[[0, 5, 11]] = IGNORED_LABEL
    return labels


TARGETS = {"hard": hard, "soft": soft, "some ignored": some_ignored}


def by_the_formula(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The mean over the samples that count of -sum_k p_k log softmax(logits)_k, in fp64."""
    if not targets.is_floating_point():
        counted = targets != IGNORED_LABEL
        logits, targets = logits[counted], torch.eye(CLASSES)[targets[counted]]
    probabilities = (1 - smoothing) * targets.double() + smoothing / CLASSES
    return -(probabilities * logits.double().log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("kind", TARGETS)
def test_the_loss_is_its_formula(kind: str, smoothing: float) -> None:
    logits, targets = drawn_logits(), TARGETS[kind]()
    found = classification_loss(logits, targets, label_smoothing=smoothing)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), by_the_formula(logits, targets, smoothing), atol=1e-6, rtol=1e-6, check_dtype=False
    )


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("kind", TARGETS)
def test_the_gradient_is_that_of_the_formula(kind: str, smoothing: float) -> None:
    targets = TARGETS[kind]()
    found, wanted = drawn_logits().requires_grad_(), drawn_logits().double().requires_grad_()
    classification_loss(found, targets, label_smoothing=smoothing).backward()
    by_the_formula(wanted, targets, smoothing).backward()
    torch.testing.assert_close(found.grad.double(), wanted.grad, atol=1e-6, rtol=1e-5)


def test_labels_are_one_hot_probabilities() -> None:
    logits, labels = drawn_logits(), hard()
    for smoothing in SMOOTHINGS:
        torch.testing.assert_close(
            classification_loss(logits, labels, label_smoothing=smoothing),
            classification_loss(logits, torch.eye(CLASSES)[labels], label_smoothing=smoothing),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_lower_precision_are_added_up_in_full_precision(dtype: torch.dtype) -> None:
    logits, labels = drawn_logits(size=2000).to(dtype), hard(size=2000)
    found = classification_loss(logits, labels)
    assert found.dtype == torch.float32
    wanted = by_the_formula(logits.double(), labels, 0.0)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("sizes", [(12,), (6, 6), (1, 4, 7), (1,) * 12])
def test_micro_batches_add_up_to_the_whole_batch(
    sizes: tuple[int, ...], kind: str, smoothing: float, as_tensor: bool
) -> None:
    targets = TARGETS[kind]()
    count = len(targets) if targets.is_floating_point() else int((targets != IGNORED_LABEL).sum())
    whole, parts = drawn_logits().requires_grad_(), drawn_logits().requires_grad_()
    loss = classification_loss(whole, targets, label_smoothing=smoothing)
    loss.backward()
    added = torch.zeros(())
    for logits, micro_targets in zip(parts.split(sizes), targets.split(sizes), strict=True):
        samples = torch.tensor(count) if as_tensor else count
        micro = classification_loss(logits, micro_targets, label_smoothing=smoothing, samples=samples)
        micro.backward(retain_graph=True)
        added += micro.detach()
    torch.testing.assert_close(added, loss.detach())
    torch.testing.assert_close(parts.grad, whole.grad)


def test_ignored_samples_have_no_gradient() -> None:
    logits = drawn_logits().requires_grad_()
    classification_loss(logits, some_ignored(), label_smoothing=0.1).backward()
    ignored = some_ignored() == IGNORED_LABEL
    assert logits.grad[ignored].abs().max() == 0
    assert logits.grad[~ignored].abs().min() > 0


@pytest.mark.parametrize("samples", [None, 4])
def test_a_batch_of_which_nothing_counts_has_a_loss_of_zero(samples: int | None) -> None:
    logits = drawn_logits().requires_grad_()
    loss = classification_loss(logits, torch.full((BATCH,), IGNORED_LABEL), samples=samples)
    assert loss == 0
    loss.backward()
    assert logits.grad.abs().max() == 0
