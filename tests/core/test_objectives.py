"""The cotangent of every objective is its derivative by the gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nio_hf.core import NIOConfig
from nio_hf.core.gradcosine import GradientSums
from nio_hf.core.objectives import NormConstraint, Objective, make_objective

GN_0, BETA, SUB_BATCHES = 2.5, 0.6, 4


def grad_cosine(gradients: Tensor) -> Tensor:
    pairs = itertools.permutations(gradients, 2)
    return torch.stack([nn.functional.cosine_similarity(a, b, dim=0) for a, b in pairs]).mean()


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gc": lambda g: -grad_cosine(g),
    "gc_norm": lambda g: -(grad_cosine(g) + BETA * g.norm(dim=1).mean() / GN_0),
    "gc_sum_norm": lambda g: -(grad_cosine(g) + g.norm(dim=1).sum()),
    "variance": lambda g: (g - g.mean(dim=0)).square().sum(dim=1).mean(),
    "constraint": lambda g: g.norm(dim=1).mean(),
}


def objective_of(name: str) -> Objective:
    if name == "constraint":
        return NormConstraint()
    config: Any = {"objective": name, "beta": BETA, "sub_batches": SUB_BATCHES}
    return make_objective(NIOConfig(**config), GN_0)


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
        split = [[row[:4].view(2, 2), row[4:]] for row in gradients]
        sums = GradientSums(split[0], SUB_BATCHES, objective.needs_gradient_sum)
        for index, row in enumerate(split):
            sums.add(index, row, torch.tensor(0.0))
        rows = [objective.cotangent(row, sums.norms[index], sums) for index, row in enumerate(split)]
        return incoming * torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]), None


@pytest.mark.parametrize("name", PLAIN)
def test_cotangents_pass_gradcheck(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(SUB_BATCHES, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(Written.apply, (gradients, name))


def test_only_the_variance_needs_the_sum_of_the_gradients() -> None:
    assert [name for name in PLAIN if objective_of(name).needs_gradient_sum] == ["variance"]
