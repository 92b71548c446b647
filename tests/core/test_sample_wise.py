"""Sample-wise GradCosine at once equals the loop over the samples."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nio_hf import grad_cosine
from nio_hf.core import Collective, LayerScales, sample_wise
from nio_hf.core.curvature import Exact
from nio_hf.core.differentiator import Differentiator
from nio_hf.core.mode import measuring
from nio_hf.core.sample_wise import sample_wise_sums
from nio_hf.core.two_pass import TwoPass
from tests.core.cases import FAMILIES, Case, case, differences, double_case, state


def both(made: Case, micro_batch_size: int | None = None) -> list[Tensor]:
    """u, norms and losses at once, and from the loop."""
    scales = LayerScales(made.model)
    differentiator = Differentiator(made.model, made.loss_fn, scales, micro_batch_size)
    batch_norm: Any = "frozen"
    passes = TwoPass(made.model, differentiator, scales, Collective(), batch_norm)
    with measuring(made.model, batch_norm), passes.statistics(made.batch):
        parts = passes.split(made.batch, len(_first_tensor(made.batch)))
        loop = passes.first_pass(Exact(differentiator), parts, "")
        at_once = sample_wise_sums(made.model, differentiator, made.batch)
    return [torch.cat([sums.buffer, sums.norms_and_losses.flatten()]) for sums in (at_once, loop)]


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_computed_at_once(name: str, micro_batch_size: int | None) -> None:
    made = double_case(name, 7)
    before = state(made.model)
    at_once, loop = both(made, micro_batch_size)
    torch.testing.assert_close(at_once, loop, rtol=1e-9, atol=1e-9)
    assert not differences(before, state(made.model))


def test_little_memory_means_few_samples_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[Any] = []
    vmap = sample_wise.vmap
    monkeypatch.setattr(sample_wise, "vmap", lambda f, **settings: sizes.append(settings) or vmap(f, **settings))
    made = double_case("mlp", 7)
    numbers = sum(parameter.numel() for parameter in made.model.parameters())
    monkeypatch.setattr(sample_wise, "CHUNK_BYTES", 2 * 8 * numbers)
    torch.testing.assert_close(*both(made), rtol=1e-9, atol=1e-9)
    assert sizes[0] == {"chunk_size": 2}


def test_it_costs_about_two_training_steps() -> None:
    made = case("vit", 16)

    def operations(compute: Any) -> int:
        with FlopCounterMode(display=False) as counter, measuring(made.model):
            compute()
        # The counter takes the grouped convolution of vectorised gradients for a full one.
        counts = counter.get_flop_counts()["Global"]
        return sum(count for name, count in counts.items() if name != torch.ops.aten.convolution_backward)

    step = operations(lambda: made.loss_fn(made.model, made.batch).backward())
    made.model.zero_grad()
    at_once = operations(lambda: grad_cosine(made.model, made.batch, made.loss_fn))
    assert 1.8 * step < at_once < 2.05 * step


def test_a_loss_that_cannot_be_vectorised_is_computed_sample_by_sample(caplog: pytest.LogCaptureFixture) -> None:
    made = case("mlp", 5)

    def with_a_look(model: nn.Module, batch: Any) -> Tensor:
        loss = made.loss_fn(model, batch)
        return loss if loss.item() < 1e9 else 2 * loss

    with caplog.at_level(logging.INFO, logger="nio_hf"):
        looked = grad_cosine(made.model, made.batch, with_a_look)
    assert "computed sample by sample" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="nio_hf"):
        at_once = grad_cosine(made.model, made.batch, made.loss_fn)
    assert not caplog.text
    assert at_once.value == pytest.approx(looked.value, abs=1e-5)
    assert at_once.norms == pytest.approx(looked.norms, rel=1e-5)


def _first_tensor(batch: Any) -> Tensor:
    return next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
