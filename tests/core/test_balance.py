"""How much larger additive tensors have to be: on models whose ratio is known, and on those of transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nio_hf import NIOConfig, initialize
from nio_hf.core import mode
from nio_hf.core.balance import balancing_factor
from nio_hf.core.collective import Collective
from nio_hf.core.groups import blocks_of, kinds_of
from nio_hf.core.loss import Loss
from nio_hf.core.sub_batches import SubBatches, split
from nio_hf.errors import ModelError, Problem
from tests.core.cases import batches_of, case, differences, state

CPU = torch.device("cpu")


class Block(nn.Module):
    """A block with two weight matrices, and a table that it adds to what it computes inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.bias_table = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        """As a residual block."""
        return x + self.second(torch.tanh(self.first(x) + self.bias_table))


class Adding(nn.Module):
    """Inputs (B, 3, 4) in the first two channels, positions of a given size in the other two, then blocks.

    Args:
        size: Length of the positions at each place; inputs have length 1.
        normalised: Whether a normalisation without a mean stands before the first block.
    """

    def __init__(self, size: float, *, normalised: bool = False) -> None:
        super().__init__()
        self.read = nn.Linear(4, 4, bias=False)
        self.read.weight.data = torch.eye(4)
        self.positions = nn.Parameter(size * torch.tensor([[0.0, 0.0, 0.6, 0.8]] * 3))
        self.norm = nn.RMSNorm(4) if normalised else nn.Identity()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, 2)."""
        x = self.norm(self.read(x) + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def inputs(samples: int = 8) -> Tensor:
    angles = torch.rand(samples, 3, generator=torch.Generator().manual_seed(0)) * 2 * math.pi
    zeros = torch.zeros_like(angles)
    return torch.stack([angles.cos(), angles.sin(), zeros, zeros], dim=-1)


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def parts_of(loss: Loss, batch: Any, samples: int = 8) -> SubBatches:
    windows = [list(range(samples // 2)), list(range(samples // 2, samples))]
    return split(batch, windows, loss, Collective(), where="batch")


def factor(model: nn.Module, batch: Any = None, loss_fn: Any = squared, size: int | None = None) -> float:
    kinds = kinds_of(model)
    additive = [weight.data for name, weight in model.named_parameters() if kinds[name] == "additive"]
    loss = Loss(model, loss_fn, CPU)
    with mode.isolated(model, CPU):
        parts = parts_of(loss, inputs() if batch is None else batch)
        return balancing_factor(loss, additive, parts, Collective(), size)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("size", [0.02, 0.3, 0.9])
def test_what_is_added_is_to_become_as_large_as_what_it_is_added_to(size: float, normalised: bool) -> None:
    assert factor(Adding(size, normalised=normalised)) == pytest.approx(1 / size, rel=1e-3)


@pytest.mark.parametrize("size", [1.0, 3.0])
def test_what_is_as_large_already_stays(size: float) -> None:
    assert factor(Adding(size)) == pytest.approx(1.0)


def test_places_that_nothing_is_added_to_do_not_count() -> None:
    batch = inputs()
    batch[:, 0] = 0.0
    assert factor(Adding(0.2), batch) == pytest.approx(5.0, rel=1e-3)


def test_micro_batches_change_nothing_and_all_is_as_it_was() -> None:
    model = Adding(0.25)
    before = state(model)
    assert factor(model, size=1) == pytest.approx(factor(model))
    assert differences(before, state(model)) == []
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_error_leaves_the_model_as_it_was() -> None:
    model, calls = Adding(0.25), []

    def failing(own: nn.Module, batch: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise ModelError(Problem("model", "broken", "Mend it"))
        return squared(own, batch)

    before = state(model)
    with pytest.raises(ModelError):
        factor(model, loss_fn=failing)
    assert differences(before, state(model)) == []
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_tables_inside_blocks_do_not_count() -> None:
    model = Adding(0.0)
    assert kinds_of(model)["blocks.0.bias_table"] == "additive"
    assert factor(model) == 1.0


def test_a_model_without_blocks_has_nothing_to_balance() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
            self.positions = nn.Parameter(torch.full((3, 4), 0.01))

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.read(x) + self.positions).mean(1))

    assert blocks_of(Flat()) == []
    assert factor(Flat()) == 1.0


@pytest.mark.parametrize("family", ["vit", "gpt2", "bert"])
def test_after_nio_additive_tensors_are_at_least_as_large_as_what_they_are_added_to(family: str) -> None:
    made = case(family)
    before = factor(made.model, made.batch, made.loss_fn)
    config = NIOConfig(sub_batches=2, report_batches=1, loss_bound=None, norm_band=None)
    result = initialize(made.model, batches_of(family, 3), made.loss_fn, config)
    scales = {group.name: group.omega for group in result.groups}
    assert scales["additive"] / scales["others"] == pytest.approx(before, rel=0.1)
    assert factor(made.model, made.batch, made.loss_fn) == pytest.approx(1.0, abs=0.1)
    assert (before > 1.5) == (family == "vit")
