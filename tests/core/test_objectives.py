"""The scores of the objectives against plain loops, and their cotangents against numerical derivatives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nio_hf.core.gradcosine import GradientSums
from nio_hf.core.objectives import NormConstraint, Objective, make_objective

GN_0, SUB_BATCHES = 2.5, 4


def grad_cosine(gradients: Tensor) -> Tensor:
    pairs = itertools.permutations(gradients, 2)
    return torch.stack([nn.functional.cosine_similarity(a, b, dim=0) for a, b in pairs]).mean()


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gc": lambda g: -grad_cosine(g),
    "gc_norm": lambda g: -(grad_cosine(g) + g.norm(dim=1).mean() / GN_0),
    "gc_sum_norm": lambda g: -(grad_cosine(g) + g.norm(dim=1).sum()),
    "variance": lambda g: (g - g.mean(dim=0)).square().sum(dim=1).mean(),
    "constraint": lambda g: g.norm(dim=1).mean(),
}


def objective_of(name: Any) -> Objective:
    return NormConstraint() if name == "constraint" else make_objective(name, SUB_BATCHES, GN_0)


def sums_of(gradients: Tensor, objective: Objective) -> GradientSums:
    """The sums over the rows (D, 7), each given as two tensors."""
    sums = GradientSums([gradients.new_zeros(2, 2), gradients.new_zeros(3)], len(gradients), objective.extra)
    for index, row in enumerate(gradients):
        sums.add(index, [row[:4].view(2, 2), row[4:]], torch.tensor(0.0))
    return sums


def random_gradients(seed: int = 0) -> Tensor:
    return torch.randn(SUB_BATCHES, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Written(torch.autograd.Function):
    """The plain objective with the cotangents of the library as its derivative."""

    @staticmethod
    def forward(ctx: Any, gradients: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(gradients)
        ctx.name = name
        return PLAIN[name](gradients)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:
        (gradients,) = ctx.saved_tensors
        objective = objective_of(ctx.name)
        sums = sums_of(gradients, objective)
        rows = [
            objective.cotangent([row[:4].view(2, 2), row[4:]], sums.norms[index], sums)
            for index, row in enumerate(gradients)
        ]
        return incoming * torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]), None


@pytest.mark.parametrize("name", PLAIN)
def test_cotangents_pass_gradcheck(name: str) -> None:
    assert torch.autograd.gradcheck(Written.apply, (random_gradients().requires_grad_(), name))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", PLAIN)
def test_scores_are_minus_the_plain_objectives(name: str, seed: int) -> None:
    gradients, objective = random_gradients(seed), objective_of(name)
    score = objective.score(sums_of(gradients, objective))
    torch.testing.assert_close(score, -PLAIN[name](gradients), rtol=1e-12, atol=1e-12)


def test_the_agreement_of_signs_is_the_mean_over_all_pairs() -> None:
    gradients, objective = random_gradients(), objective_of("gc_sign")
    score = objective.score(sums_of(gradients, objective))
    torch.testing.assert_close(score, grad_cosine(gradients.sign()), rtol=1e-12, atol=1e-12)
    rescaled = gradients * torch.tensor([1.0, 1e-3, 7.0, 1e4])[:, None]
    assert torch.equal(objective.score(sums_of(rescaled, objective)), score)


def test_entries_without_a_gradient_count_for_no_sign() -> None:
    """Pairs are weighted by their common number of entries, which a loop over pairs and entries gives too."""
    gradients, objective = random_gradients(), objective_of("gc_sign")
    gradients[0, 1:5] = 0
    gradients[2, 6] = 0
    products, lengths = 0.0, 0.0
    for first, second in itertools.permutations(range(SUB_BATCHES), 2):
        for a, b in zip(gradients[first].tolist(), gradients[second].tolist(), strict=True):
            products += ((a > 0) - (a < 0)) * ((b > 0) - (b < 0))
    for row in gradients.tolist():
        lengths += sum(value != 0 for value in row)
    score = float(objective.score(sums_of(gradients, objective)))
    assert score == pytest.approx(products / ((SUB_BATCHES - 1) * lengths), abs=1e-12)


def test_each_objective_says_what_it_needs_beside_the_unit_gradients() -> None:
    needed = {name: objective_of(name).extra for name in (*PLAIN, "gc_sign")}
    assert needed == dict.fromkeys(PLAIN) | {"variance": "gradient", "gc_sign": "sign"}
