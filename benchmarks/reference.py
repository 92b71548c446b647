"""The oracle: one joint graph over all sub-batches, written as plainly as possible. For tests and the benchmark.

It costs 1 + 2 D training steps of arithmetic and D graphs of memory; `initialize` gives the same numbers for less.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nio_hf.core.adam import Branch
from nio_hf.core.config import ObjectiveName

LossesFn = Callable[[nn.Module], Sequence[Tensor]]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What one iteration computes, from the joint graph.

    Attributes:
        value: J of the branch.
        grad_cosine: GC.
        grad_norm: GN.
        norms: (D,) n_d.
        scale_gradient: (m,) dJ/domega at omega = 1.
    """

    value: Tensor
    grad_cosine: Tensor
    grad_norm: Tensor
    norms: Tensor
    scale_gradient: Tensor


def joint_graph(
    model: nn.Module,
    losses_fn: LossesFn,
    *,
    gradient: Sequence[str],
    scaled: Sequence[str],
    objective: ObjectiveName = "gc",
    branch: Branch = "objective",
) -> Reference:
    """GC, GN and dJ/domega by differentiating through all D gradients at once.

    Args:
        model: in the state to measure in.
        losses_fn: (model) -> the D mean losses L_d, in one graph.
        gradient: names of the gradient tensors.
        scaled: names of the scaled tensors.
        objective: what J is in the branch "objective".
        branch: "constraint" differentiates GN.
    """
    weights = dict(model.named_parameters())
    omega = {name: weights[name].new_ones((), requires_grad=True) for name in scaled}
    theta = {name: omega[name] * weight if name in omega else weight for name, weight in weights.items()}
    losses = torch.func.functional_call(_Losses(model, losses_fn), {f"model.{n}": t for n, t in theta.items()}, ())
    gradients = []
    for loss in losses:
        parts = torch.autograd.grad(loss, [theta[name] for name in gradient], create_graph=True)
        gradients.append(torch.cat([part.reshape(-1) for part in parts]))
    norms = torch.stack([g.norm() for g in gradients])
    cosines = [torch.dot(a, b) / (a.norm() * b.norm()) for a, b in itertools.permutations(gradients, 2)]
    grad_cosine = torch.stack(cosines).mean()
    value = norms.mean() if branch == "constraint" else -(grad_cosine + norms.sum() * (objective == "gc_sum_norm"))
    shares = torch.autograd.grad(value, list(omega.values()))
    return Reference(value.detach(), grad_cosine.detach(), norms.mean().detach(), norms.detach(), torch.stack(shares))


class _Losses(nn.Module):
    """The losses as the forward of a module, so that its parameters can be replaced."""

    def __init__(self, model: nn.Module, losses_fn: LossesFn) -> None:
        super().__init__()
        self.model = model
        self._losses_fn = losses_fn

    def forward(self) -> Sequence[Tensor]:
        return self._losses_fn(self.model)
