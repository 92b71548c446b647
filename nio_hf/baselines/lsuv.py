"""LSUV: layer after layer, weights scaled until the output of the layer has unit variance.

Source: Mishkin and Matas, "All you need is a good init", ICLR 2016, arXiv 1511.06422, algorithm 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nio_hf.baselines.options import check_options, is_count, is_number
from nio_hf.baselines.tensors import LayerWeight, layer_weights
from nio_hf.core import Collective, InitResult, NIOConfig
from nio_hf.core.batches import chunks, to_device
from nio_hf.core.differentiator import LossFn
from nio_hf.core.loop import iteration_seed
from nio_hf.core.method import SINGLE_PROCESS, Learned, OnIteration, Workspace, run_method
from nio_hf.core.two_pass import located
from nio_hf.errors import NumericsError, Problem

logger = logging.getLogger(__name__)


def lsuv(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    config: NIOConfig | None = None,
    *,
    holdout: Sequence[Any] | None = None,
    on_iteration: OnIteration | None = None,
    collective: Collective = SINGLE_PROCESS,
    orthonormal: bool = True,
    tolerance: float = 0.1,
    max_trials: int = 10,
) -> InitResult:
    """Scale the weight of each layer until the variance of its output is 1, in the order in which layers are computed.

        while |Var(y_l) - 1| >= tolerance, at most max_trials times:   W_l <- W_l / sqrt(Var(y_l))

    Var(y_l) is taken over all entries of the output of layer l, bias included, on one batch. With `orthonormal` the
    weights are first drawn anew as (half-)orthonormal matrices (rows are the first dimension, columns all others).

    A layer is a weight of a linear or convolution layer. One that is called several times, or tied to another layer,
    counts once, with the outputs of all calls together, at the place of its first call; where its later calls move what
    was scaled before, the sequence is gone through again, at most max_trials times. Query, key and value
    projections are layers of their own; the product of queries and keys is not normalised. Left as they are after the
    first step, with a warning that names them: layers whose output no module shows (in torch's MultiheadAttention),
    layers whose output has no variance or does not reach the tolerance, e.g. for a large bias. The paper keeps the
    last trial of the latter; putting the weight back is our choice, as a layer with a large bias would lose its weight.
    Layers that are never called and weights that are tied to an embedding are not touched.

    Args:
        model: as in [`initialize`], and likewise what follows.
        batches: see there; one that is not held out is used.
        loss_fn: see there; it is called to run the model.
        config: of the shared settings, `seed` decides on the orthonormal matrices; the others are used to measure.
        holdout: see there.
        on_iteration: never called.
        collective: see there. Every process computes the whole batch, and the weights of rank 0 count.
        orthonormal: False keeps the weights that the model has and only scales them.
        tolerance: in (0, 1).
        max_trials: at least 1.

    Raises:
        ConfigError: lists the options that are out of range.
        ModelError: for a model without linear or convolution layers.
        NumericsError: for an output variance that is not finite.
        NIOError: as in [`initialize`].
    """
    check_options(
        "lsuv",
        ("orthonormal", orthonormal, isinstance(orthonormal, bool), "Give true or false"),
        ("tolerance", tolerance, is_number(tolerance) and 0 < tolerance < 1, "Give a number between 0 and 1"),
        ("max_trials", max_trials, is_count(max_trials), "Give a whole number of at least 1"),
    )

    def learn(workspace: Workspace) -> Learned:
        collective, device = workspace.passes.collective, workspace.differentiator.device
        layers = layer_weights(workspace.model, workspace.scales)
        batch = workspace.stream.next()
        with collective.together():
            if orthonormal:
                _make_orthonormal(layers, workspace.config.seed)
            _Scaling(workspace, layers, to_device(batch, device), tolerance, max_trials).run()
        for value in workspace.theta:
            collective.broadcast_(value)
        return Learned()

    return run_method(
        "lsuv",
        learn,
        model,
        batches,
        loss_fn,
        config,
        iterations=1,
        holdout=holdout,
        on_iteration=on_iteration,
        collective=collective,
        options={"orthonormal": orthonormal, "tolerance": tolerance, "max_trials": max_trials},
    )


def _make_orthonormal(layers: Sequence[LayerWeight], seed: int) -> None:
    """Draw the weights anew, the same ones on every device."""
    generator = torch.Generator().manual_seed(iteration_seed(seed, 0))
    for layer in layers:
        drawn = torch.empty(layer.parameter.shape, dtype=layer.parameter.dtype)
        nn.init.orthogonal_(drawn, generator=generator)
        layer.parameter.data.copy_(drawn)


@dataclasses.dataclass
class Moments:
    """Mean and variance of numbers that come in parts.

    Attributes:
        count: of the numbers so far.
        mean: of them.
        squares: sum of their squared distances from the mean.
        rounding: size of a number that differs from 0 by rounding only.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    rounding: float = 0.0

    def add(self, values: Tensor) -> None:
        """Add the entries of a tensor."""
        precise = values.detach().double()
        mean, squares, largest = torch.stack(
            [precise.mean(), (precise - precise.mean()).square().sum(), precise.abs().max()]
        ).tolist()
        total = self.count + values.numel()
        shift = mean - self.mean
        self.squares += squares + shift**2 * self.count * values.numel() / total
        self.mean += shift * values.numel() / total
        self.count = total
        self.rounding = max(self.rounding, torch.finfo(values.dtype).eps * largest)

    @property
    def variance(self) -> float:
        """Mean squared distance from the mean; exactly 0 where that is rounding."""
        variance = self.squares / self.count
        return 0.0 if variance <= self.rounding**2 else variance


class _Scaling:
    """The sequence over the layers.

    Args:
        workspace: of the run.
        layers: in any order.
        batch: on the device of the model.
        tolerance: of the variance.
        max_trials: per layer.
    """

    def __init__(
        self, workspace: Workspace, layers: Sequence[LayerWeight], batch: Any, tolerance: float, max_trials: int
    ) -> None:
        self._workspace = workspace
        self._layers = layers
        self._batch = batch
        self._tolerance = tolerance
        self._max_trials = max_trials

    def run(self) -> None:
        """Scale the layers and say which were left."""
        called = list(self._variances(self._layers))
        left = {layer.place.name: "no module shows its output" for layer in self._layers if layer not in called}
        # A layer that is called again later moves what was scaled before it: then the sequence starts anew.
        for _ in range(self._max_trials):
            given_up = {layer: reason for layer in called if (reason := self._scale(layer)) is not None}
            variances = self._variances(called)
            moved = [layer for layer in called if layer not in given_up and not self._is_unit(variances[layer])]
            if not moved:
                break
        left |= {layer.place.name: reason for layer, reason in given_up.items()}
        left |= {layer.place.name: f"layers behind it move it to {variances[layer]:.4g}" for layer in moved}
        for name, reason in left.items() if self._workspace.passes.collective.rank == 0 else ():
            logger.warning("LSUV: %s has no unit variance: %s.", name, reason)

    def _scale(self, layer: LayerWeight) -> str | None:
        """Scale one layer; why it was left as it was, or None."""
        weight = layer.parameter.data
        saved = weight.clone()
        variance = self._variance(layer)
        for _ in range(self._max_trials):
            if variance == 0 or self._is_unit(variance):
                break
            weight.div_(math.sqrt(variance))
            variance = self._variance(layer)
        if self._is_unit(variance):
            return None
        weight.copy_(saved)
        if variance == 0:
            return "its output has no variance"
        return f"its output variance is {variance:.4g} after {self._max_trials} trials"

    def _is_unit(self, variance: float) -> bool:
        return abs(variance - 1) < self._tolerance

    def _variance(self, layer: LayerWeight) -> float:
        return self._variances([layer])[layer]

    def _variances(self, layers: Sequence[LayerWeight]) -> dict[LayerWeight, float]:
        """Output variance of those layers that are called, in the order of their first calls.

        Raises:
            NumericsError: for one that is not finite.
        """
        compute = functools.partial(self._forward, layers)
        moments = self._workspace.passes.back_off.run(compute, self._batch, "LSUV")
        for layer, found in moments.items():
            if not math.isfinite(found.squares):
                fix = "Check the inputs and the layers in front of it"
                raise NumericsError(Problem(f"LSUV, {layer.place.name}", "its output is not finite", fix))
        return {layer: found.variance for layer, found in moments.items()}

    @torch.no_grad()
    def _forward(self, layers: Sequence[LayerWeight]) -> dict[LayerWeight, Moments]:
        differentiator = self._workspace.differentiator
        differentiator.seed = iteration_seed(self._workspace.config.seed, 1)
        with self._workspace.passes.statistics(self._batch), _observed(layers) as moments, located("LSUV"):
            for index, part in enumerate(chunks(self._batch, differentiator.micro_batch_size)):
                differentiator.loss_sum(part, index)
        return moments


@contextlib.contextmanager
def _observed(layers: Sequence[LayerWeight]) -> Iterator[dict[LayerWeight, Moments]]:
    """Collect the outputs of layers, in the order of their first calls."""
    moments: dict[LayerWeight, Moments] = {}

    def observe(layer: LayerWeight, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.numel():
            moments.setdefault(layer, Moments()).add(output)

    with contextlib.ExitStack() as stack:
        for layer in layers:
            for owner in layer.owners:
                handle = owner.register_forward_hook(functools.partial(observe, layer))
                stack.callback(handle.remove)
        yield moments
