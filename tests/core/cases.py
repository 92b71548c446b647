"""Models with data and loss, and what the tests compare of them."""

import contextlib
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from nio_hf.core import mode
from nio_hf.core.batches import take
from nio_hf.core.collective import Collective
from nio_hf.core.loss import Loss, LossFn
from nio_hf.core.problem import ScalingProblem
from nio_hf.core.result import GradCosine
from nio_hf.core.stream import BatchStream
from nio_hf.core.tensors import copied_values, find_tensors
from tests import zoo

PER_TENSOR = {"search": "published", "groups": "tensor", "scaled_tensors": "all", "objective": "gc"}
"""Settings of the published search, with a scale of its own for every tensor, and GradCosine alone."""
SEARCHES = {
    "exact": {**PER_TENSOR, "iterations": 5, "curvature": "exact"},
    "finite differences": {**PER_TENSOR, "iterations": 5, "curvature": "finite_difference"},
    "balance": {},
}
FAMILIES = [*zoo.VISION, *zoo.TEXT, "mlp"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a batch for it, and a loss."""

    model: nn.Module
    batch: Any
    loss_fn: LossFn

    def mean_loss(self, positions, model=None):
        """Mean loss of the samples at some positions."""
        returned = self.loss_fn(model or self.model, take(self.batch, positions))
        return returned[0] / returned[1] if isinstance(returned, tuple) else returned


def case(name, samples=8, **config):
    """The same weights at every call."""
    set_seed(0)
    if name == "mlp":
        return Case(zoo.mlp(), zoo.vectors(samples), zoo.vector_loss)
    if name in zoo.VISION:
        return Case(zoo.vision_model(name, **config), zoo.images(samples), zoo.image_loss)
    model = zoo.text_model(name, **config)
    return Case(model, zoo.sentences(samples), zoo.text_loss)


def double_case(name, samples=8):
    """The same in fp64, every nonzero tensor moved far enough from its tiny initial values to matter."""
    made = case(name, samples)
    made.model.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.any():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return made


def batches_of(name, count, samples=8):
    make = zoo.vectors if name == "mlp" else zoo.images if name in zoo.VISION else zoo.sentences
    return [make(samples, seed=seed) for seed in range(count)]


class AdamByHand:
    """Steps of the published Adam for one scale, in plain numbers."""

    def __init__(self):
        self.second = 0.0
        self.first = {"objective": 0.0, "constraint": 0.0}
        self.steps = {"objective": 0, "constraint": 0}

    def direction(self, gradient, branch):
        clipped = max(-1.0, min(1.0, gradient))
        self.steps[branch] += 1
        self.first[branch] = 0.9 * self.first[branch] + 0.1 * clipped
        self.second = 0.999 * self.second + 0.001 * clipped**2
        mean = self.first[branch] / (1 - 0.9 ** self.steps[branch])
        square = self.second / (1 - 0.999 ** sum(self.steps.values()))
        return -mean / (math.sqrt(square) + 1e-8)


def contrastive(model, batch):
    """A loss that compares the samples of a batch with each other: 0 for one alone."""
    outputs = nn.functional.normalize(model(batch[0].to(next(model.parameters()).dtype)), dim=-1)
    return nn.functional.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


@contextlib.contextmanager
def scaling_problem(model, loss_fn, config, reported=()):
    """What a method is given, with a measurement before that is made up."""
    device = torch.device("cpu")
    tensors = find_tensors(model, config.scaled_tensors, config.groups)
    before = GradCosine.mean([GradCosine(0.0, 1.0, (1.0,) * config.sub_batches, 1.0, 8)])
    stream = BatchStream((), config.sub_batches, config.batches)
    with mode.isolated(model, device), copied_values(tensors) as initial:
        loss, size = Loss(model, loss_fn, device), config.micro_batch_size
        yield ScalingProblem(config, loss, tensors, initial, Collective(), stream, reported, before, size)


def state(model):
    """All that NIO promises to leave alone in a model, values included."""
    found = {name: module.training for name, module in model.named_modules()}
    for name, parameter in model.named_parameters():
        grad = None if parameter.grad is None else parameter.grad.clone()
        found[f"{name}: parameter"] = (id(parameter), parameter.data_ptr(), parameter.requires_grad, grad)
        found[f"{name}: value"] = parameter.detach().clone()
    found.update({f"{name}: buffer": buffer.clone() for name, buffer in model.named_buffers()})
    return found


def differences(before, after):
    """Entries of two states that are not the same, bit for bit."""
    assert before.keys() == after.keys()
    return [key for key, value in before.items() if not _same(value, after[key])]


@contextlib.contextmanager
def unchanged(model):
    """Hold that a block leaves the model as it was, bit for bit."""
    before = state(model)
    yield
    changed = differences(before, state(model))
    assert not changed, changed


def _same(left, right):
    if isinstance(left, tuple):
        return all(_same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and torch.equal(left.nan_to_num(), right.nan_to_num())
    return bool(left == right)
