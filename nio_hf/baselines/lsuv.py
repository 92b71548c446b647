"""LSUV: layer after layer, weights scaled until the output of the layer has unit variance."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nio_hf.core.batches import batch_size, chunks, to_device
from nio_hf.core.config import is_count, is_number
from nio_hf.core.layers import layer_weights
from nio_hf.core.memory import with_less_memory
from nio_hf.core.method import Check, Learned, Method, Options, Watch
from nio_hf.core.problem import FORWARD_SHARE, ScalingProblem, seed_of
from nio_hf.core.sub_batches import located, split_check
from nio_hf.core.tensors import TensorPlace
from nio_hf.errors import NumericsError, Problem

logger = logging.getLogger(__name__)


def scale_outputs(problem: ScalingProblem, options: Options, watch: Watch) -> Learned:
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

    Every process computes the whole batch, and the weights of rank 0 count.

    Options:
        orthonormal: False keeps the weights that the model has and only scales them; the seed decides on new ones.
        tolerance: Number in (0, 1).
        max_trials: At least 1.

    Raises:
        ModelError: A model without linear or convolution layers.
        NumericsError: An output variance that is not finite.

    Source: Mishkin and Matas, "All you need is a good init", ICLR 2016, arXiv 1511.06422, algorithm 1.
    """
    layers = layer_weights(problem.loss.model, problem.tensors)
    batch = problem.stream.next()
    with problem.collective.together():
        if options["orthonormal"]:
            _make_orthonormal(layers, problem.config.seed)
        outputs = _Outputs(problem, layers, to_device(batch, problem.loss.device), problem.micro_batch_size)
        left = _scale_in_turn(outputs, options["tolerance"], options["max_trials"])
    for name, reason in left.items() if problem.collective.rank == 0 else ():
        logger.warning("LSUV: %s has no unit variance: %s.", name, reason)
    for value in problem.theta:
        problem.collective.broadcast_(value)
    return Learned(cost=outputs.forwards * FORWARD_SHARE)


def _make_orthonormal(layers: Iterable[TensorPlace], seed: int) -> None:
    """Draw the weights anew, the same ones on every device."""
    generator = torch.Generator().manual_seed(seed_of(seed, 0))
    for place in layers:
        drawn = torch.empty(place.parameter.shape, dtype=place.parameter.dtype)
        nn.init.orthogonal_(drawn, generator=generator)
        place.parameter.data.copy_(drawn)


def _scale_in_turn(outputs: _Outputs, tolerance: float, max_trials: int) -> dict[str, str]:
    """Scale the layers in the order of their first calls; why which of them were left, by name."""
    called = list(outputs.variances(outputs.layers))
    left = {place.name: "no module shows its output" for place in outputs.layers if place not in called}
    # A layer that is called again later moves what was scaled before it: then the sequence starts anew.
    for _ in range(max_trials):
        given_up = {p.name: reason for p in called if (reason := _scale(p, outputs, tolerance, max_trials)) is not None}
        scaled = {p.name: v for p, v in outputs.variances(called).items() if p.name not in given_up}
        moved = {name: variance for name, variance in scaled.items() if not abs(variance - 1) < tolerance}
        if not moved:
            break
    return left | given_up | {name: f"layers behind it move it to {variance:.4g}" for name, variance in moved.items()}


def _scale(place: TensorPlace, outputs: _Outputs, tolerance: float, max_trials: int) -> str | None:
    """Scale one layer; why it was left as it was, or None."""
    weight = place.parameter.data
    saved = weight.clone()
    for trial in range(max_trials + 1):
        variance = outputs.variances([place])[place]
        if abs(variance - 1) < tolerance:
            return None
        if variance == 0:
            break
        if trial < max_trials:
            weight.div_(math.sqrt(variance))
    weight.copy_(saved)
    if variance == 0:
        return "its output has no variance"
    return f"its output variance is {variance:.4g} after {max_trials} trials"


@dataclasses.dataclass
class _Outputs:
    """The outputs of the layers on a batch.

    Attributes:
        problem: Task of the run.
        layers: {weight: the modules that own it}.
        batch: On the device of the model.
        micro_batch_size: Samples computed at once.
        forwards: Number of forward passes so far.
    """

    problem: ScalingProblem
    layers: Mapping[TensorPlace, Sequence[nn.Module]]
    batch: Any
    micro_batch_size: int | None
    forwards: int = 0

    def variances(self, layers: Iterable[TensorPlace]) -> dict[TensorPlace, float]:
        """Output variance of those layers that are called, in the order of their first calls.

        Raises:
            NumericsError: One that is not finite.
        """
        loss, seed = self.problem.loss, seed_of(self.problem.config.seed, 1)

        @torch.no_grad()
        def compute(size: int | None) -> dict[TensorPlace, Moments]:
            with self._observed(layers) as moments:
                for index, part in enumerate(chunks(self.batch, size)):
                    loss(part, seed, index)
            return moments

        with located("LSUV"):
            moments, self.micro_batch_size = with_less_memory(
                compute,
                batch_size(self.batch),
                self.micro_batch_size,
                where="LSUV",
                device=loss.device,
                check_split=split_check(loss, self.batch, seed),
            )
        self.forwards += 1
        variances = {place: found.variance for place, found in moments.items()}
        for place, variance in variances.items():
            if not math.isfinite(variance):
                fix = "Check the inputs and the layers in front of it"
                raise NumericsError(Problem(f"LSUV, {place.name}", "its output is not finite", fix))
        return variances

    @contextlib.contextmanager
    def _observed(self, layers: Iterable[TensorPlace]) -> Iterator[dict[TensorPlace, Moments]]:
        """Collect the outputs of layers, in the order of their first calls."""
        moments: dict[TensorPlace, Moments] = {}

        def observe(place: TensorPlace, module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.numel():
                moments.setdefault(place, Moments()).add(output)

        with contextlib.ExitStack() as stack:
            for place in layers:
                for owner in self.layers[place]:
                    stack.enter_context(owner.register_forward_hook(functools.partial(observe, place)))
            yield moments


@dataclasses.dataclass
class Moments:
    """Variance of numbers that come in parts.

    Attributes:
        parts: (count, mean, variance, size of a number that differs from 0 by rounding only) of each part.
    """

    parts: list[tuple[int, float, float, float]] = dataclasses.field(default_factory=list)

    def add(self, values: Tensor) -> None:
        """Add the entries of a tensor."""
        precise = values.detach().double()
        mean, variance, largest = torch.stack([precise.mean(), precise.var(correction=0), precise.abs().max()]).tolist()
        self.parts.append((values.numel(), mean, variance, torch.finfo(values.dtype).eps * largest))

    @property
    def variance(self) -> float:
        """Mean squared distance from the mean; exactly 0 where that is rounding."""
        total = sum(count for count, *_ in self.parts)
        mean = sum(count * own_mean for count, own_mean, *_ in self.parts) / total
        variance = sum(count * (own + (own_mean - mean) ** 2) for count, own_mean, own, _ in self.parts) / total
        return 0.0 if variance <= max(rounding for *_, rounding in self.parts) ** 2 else variance


def _checks(options: Options) -> Iterator[Check]:
    orthonormal, tolerance, max_trials = (options[name] for name in ("orthonormal", "tolerance", "max_trials"))
    yield "orthonormal", orthonormal, isinstance(orthonormal, bool), "Give true or false"
    yield "tolerance", tolerance, is_number(tolerance) and 0 < tolerance < 1, "Give a number between 0 and 1"
    yield "max_trials", max_trials, is_count(max_trials), "Give a whole number of at least 1"


LSUV = Method(
    name="lsuv",
    title="LSUV",
    describe=lambda config: (
        "LSUV (Mishkin and Matas, 2015) scaled the weights of each layer to an output variance of 1."
    ),
    learn=scale_outputs,
    batches=lambda config, options: 1,
    most_cost=lambda config, groups, options: None,
    options={"orthonormal": True, "tolerance": 0.1, "max_trials": 10},
    check=_checks,
)
"""LSUV."""
