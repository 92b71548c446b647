"""Models with data and loss, and what the tests compare of them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from nio_hf.core import mode
from nio_hf.core.batches import take
from nio_hf.core.collective import Collective
from nio_hf.core.config import NIOConfig
from nio_hf.core.loss import Loss, LossFn
from nio_hf.core.problem import ScalingProblem
from nio_hf.core.result import GradCosine
from nio_hf.core.stream import BatchStream
from nio_hf.core.tensors import copied_values, find_tensors
from tests import zoo

PER_TENSOR: dict[str, Any] = {
    "search": "published",
    "groups": "tensor",
    "scaled_tensors": "all",
    "objective": "gc",
    "loss_bound": None,
    "norm_band": None,
}
"""Settings of NIO by Adam on omega, with a scale of its own for every tensor, and GradCosine alone."""
FAMILIES = [*zoo.VISION, *zoo.TEXT, "mlp"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a batch for it, and a loss."""

    model: nn.Module
    batch: Any
    loss_fn: LossFn

    def mean_loss(self, positions: Sequence[int], model: nn.Module | None = None) -> Tensor:
        """Mean loss of the samples at some positions."""
        returned = self.loss_fn(model or self.model, take(self.batch, positions))
        return returned[0] / returned[1] if isinstance(returned, tuple) else returned


def case(name: str, samples: int = 8, **config: Any) -> Case:
    """A tiny model with the same weights at every call."""
    set_seed(0)
    if name == "mlp":
        return Case(zoo.mlp(), zoo.vectors(samples), zoo.vector_loss)
    if name in zoo.VISION:
        return Case(zoo.vision_model(name, **config), zoo.images(samples), zoo.image_loss)
    model = zoo.text_model(name, **config)
    return Case(model, zoo.sentences(samples), zoo.text_loss)


def double_case(name: str, samples: int = 8) -> Case:
    """The same in fp64, every nonzero tensor moved far enough from its tiny initial values to matter."""
    made = case(name, samples)
    made.model.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.any():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return made


def batches_of(name: str, count: int, samples: int = 8) -> list[Any]:
    """Different batches for a family."""
    make: Callable[..., Any] = zoo.vectors if name == "mlp" else zoo.images if name in zoo.VISION else zoo.sentences
    return [make(samples, seed=seed) for seed in range(count)]


@contextlib.contextmanager
def scaling_problem(
    model: nn.Module, loss_fn: LossFn, config: NIOConfig, batches: Any = (), grad_norm: float = 1.0
) -> Iterator[ScalingProblem]:
    """What a method is given, for a model whose gradient norm on the report batches is `grad_norm`."""
    device = torch.device("cpu")
    tensors = find_tensors(model, config.scaled_tensors, config.groups)
    before = GradCosine.mean([GradCosine(0.0, grad_norm, (grad_norm,) * config.sub_batches, 1.0, 8)])
    stream = BatchStream(batches, config.sub_batches, config.batches)
    with mode.isolated(model, device), copied_values(tensors) as initial:
        loss = Loss(model, loss_fn, device)
        yield ScalingProblem(config, loss, tensors, initial, Collective(), stream, before, config.micro_batch_size)


def state(model: nn.Module) -> dict[str, Any]:
    """All that NIO promises to leave alone in a model, values included."""
    found: dict[str, Any] = {name: module.training for name, module in model.named_modules()}
    for name, parameter in model.named_parameters():
        grad = None if parameter.grad is None else parameter.grad.clone()
        found[f"{name}: parameter"] = (id(parameter), parameter.data_ptr(), parameter.requires_grad, grad)
        found[f"{name}: value"] = parameter.detach().clone()
    found.update({f"{name}: buffer": buffer.clone() for name, buffer in model.named_buffers()})
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Entries of two states that are not the same, bit for bit."""
    assert before.keys() == after.keys()
    return [key for key, value in before.items() if not _same(value, after[key])]


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, tuple):
        return all(_same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and torch.equal(left.nan_to_num(), right.nan_to_num())
    return bool(left == right)


class Agreement(nn.Module):
    """Layers of one size whose gradients agree most at scales that are known.

    With W the weights of a layer, of length 1, o a direction across it, b its best scale, and s_i a number for each
    sample,

        L = mean_i sum over the layers of (<level W + 2 o, theta> + s_i / 2 ||theta - b W||^2).

    At theta = omega W the gradient of sub-batch d is level W + 2 o + mean(s) (omega - b) W: the sub-batches agree the
    more, the closer omega is to b. Where the numbers s have the mean 0, the loss is the sum of level omega.

    Args:
        best: b of each layer.
        levels: of each layer.
    """

    def __init__(self, best: Sequence[float], levels: Sequence[float]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 3, bias=False, dtype=torch.float64) for _ in best)
        self.targets, self.slopes = [], []
        for layer, omega, level in zip(self.layers, best, levels, strict=True):
            weight, across = torch.linalg.qr(torch.randn(12, 2, generator=generator, dtype=torch.float64))[0].T
            layer.weight.data = weight.reshape(3, 4).clone()
            self.targets.append(omega * layer.weight.detach())
            self.slopes.append((level * weight + 2 * across).reshape(3, 4))

    @staticmethod
    def loss(model: Agreement, batch: Tensor) -> Tensor:
        """The mean loss of a batch of the numbers s_i."""
        total = batch.new_zeros(())
        for layer, target, slope in zip(model.layers, model.targets, model.slopes, strict=True):
            total = total + (slope * layer.weight).sum() + batch.mean() / 2 * (layer.weight - target).square().sum()
        return total

    @staticmethod
    def batches(count: int) -> list[Tensor]:
        """The same batch so many times, so that differences between points have no noise."""
        numbers = torch.tensor([2.0, 1.0, -1.5, 0.5, 0.0, -2.5, 1.5, -1.0], dtype=torch.float64)
        return [numbers] * count

    def measured(self, exponents: Sequence[float], batch: Tensor, objective: str) -> tuple[float, float, float]:
        """Loss, gradient norm and objective of a batch in four parts, at log2 of the scales, by a plain loop."""
        originals = [layer.weight.data for layer in self.layers]
        for layer, weight, exponent in zip(self.layers, originals, exponents, strict=True):
            layer.weight.data = weight * 2.0**exponent
        losses = [Agreement.loss(self, part) for part in batch.view(4, 2)]
        rows = [torch.autograd.grad(loss, list(self.parameters())) for loss in losses]
        for layer, weight in zip(self.layers, originals, strict=True):
            layer.weight.data = weight
        gradients = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])
        if objective == "gc":
            pairs = itertools.combinations(gradients, 2)
            score = float(torch.stack([nn.functional.cosine_similarity(a, b, dim=0) for a, b in pairs]).mean())
        else:
            score = -float((gradients - gradients.mean(0)).square().sum(1).mean())
        return float(torch.stack(losses).detach().mean()), float(gradients.norm(dim=1).mean()), score
