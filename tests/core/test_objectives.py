"""The cotangents of the objectives against numerical derivatives of plain loops."""

import itertools

import pytest
import torch
from torch import nn

from nio_hf.core.gradcosine import GradientSums
from nio_hf.core.objectives import NormConstraint, make_objective

SUB_BATCHES = 4


def grad_cosine(gradients):
    pairs = itertools.permutations(gradients, 2)
    return torch.stack([nn.functional.cosine_similarity(a, b, dim=0) for a, b in pairs]).mean()


PLAIN = {
    "gc": lambda g: -grad_cosine(g),
    "gc_sum_norm": lambda g: -(grad_cosine(g) + g.norm(dim=1).sum()),
    "constraint": lambda g: g.norm(dim=1).mean(),
}


def objective_of(name):
    return NormConstraint() if name == "constraint" else make_objective(name)


def sums_of(gradients):
    """The sums over the rows (D, 7), each given as two tensors."""
    sums = GradientSums([gradients.new_zeros(2, 2), gradients.new_zeros(3)], len(gradients))
    for index, row in enumerate(gradients):
        sums.add(index, [row[:4].view(2, 2), row[4:]], torch.tensor(0.0))
    return sums


def random_gradients():
    return torch.randn(SUB_BATCHES, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Written(torch.autograd.Function):
    """The plain objective with the cotangents of the library as its derivative."""

    @staticmethod
    def forward(ctx, gradients, name):
        ctx.save_for_backward(gradients)
        ctx.name = name
        return PLAIN[name](gradients)

    @staticmethod
    def backward(ctx, incoming):
        (gradients,) = ctx.saved_tensors
        objective = objective_of(ctx.name)
        sums = sums_of(gradients)
        rows = [
            objective.cotangent([row[:4].view(2, 2), row[4:]], sums.norms[index], sums)
            for index, row in enumerate(gradients)
        ]
        return incoming * torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]), None


@pytest.mark.parametrize("name", PLAIN)
def test_cotangents_pass_gradcheck(name):
    assert torch.autograd.gradcheck(Written.apply, (random_gradients().requires_grad_(), name))
