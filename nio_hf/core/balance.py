"""The default search of NIO: scales that are computed, and held against bounds.

    c_k = f for all groups, f the factor with which layers keep the variance of their inputs, see
          `layers.preserving_factor`
    c_k = f b for additive tensors, such as positions and tokens, b the factor with which they are as large as what they
          are added to, see [`balancing_factor`]
    omega_k = c_k^t with the strength t, or half of these exponents, a quarter, ... where that breaks a bound

Nothing is maximised: what GradCosine says of such scales is no guide to training (benchmarks/layer_scales).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nio_hf.core.batches import chunks
from nio_hf.core.collective import Collective
from nio_hf.core.config import NIOConfig
from nio_hf.core.groups import blocks_of
from nio_hf.core.layers import preserving_factor
from nio_hf.core.loss import Loss
from nio_hf.core.method import Learned, Options, Watch
from nio_hf.core.problem import FORWARD_SHARE, ScalingProblem, report_parts
from nio_hf.core.result import GradCosine, IterationRecord, Outcome
from nio_hf.core.sub_batches import SubBatches, on_sub_batch
from nio_hf.errors import NumericsError

LEAST_EXPONENT = 0.25
"""log2 of the largest scale below which none is tried; our choice."""
_BALANCING_COST = 2 * FORWARD_SHARE
_LEAST_TURN = 1e-6
"""1 - cosine below which additive tensors do not reach the first block; our choice, rounding in fp32."""


def balance_scales(problem: ScalingProblem, options: Options, watch: Watch) -> Learned:
    """Compute the scales, and apply as much of them as the bounds allow.

    Raises:
        StoppedError: Where that was asked for.
    """
    started = time.perf_counter()
    exponents, size, cost = _computed_exponents(problem)
    history: list[IterationRecord] = []
    scales, after = (1.0,) * len(exponents), problem.before
    while max(map(abs, exponents), default=0.0) >= LEAST_EXPONENT and after is problem.before:
        watch.stop_if_asked(problem.collective)
        candidate = tuple(2.0**exponent for exponent in exponents)
        tried = _describe(problem, candidate)
        watch.tries(tried)
        problem.place(candidate)
        try:
            measured, size = problem.measure(size)
            outcome = _outcome(problem.config, problem.before, measured)
        except NumericsError:
            measured, outcome = None, "loss_bound"
        record = IterationRecord(
            iteration=len(history) + 1,
            tried=tried,
            outcome=outcome,
            loss=math.nan if measured is None else measured.loss,
            grad_cosine=None if measured is None else measured.value,
            grad_norm=None if measured is None else measured.grad_norm,
            scale=candidate[_largest_group(problem)],
            cost=len(problem.reported) + (0.0 if history else cost),
            seconds=time.perf_counter() - started,
            micro_batch_size=size,
        )
        started = time.perf_counter()
        history.append(record)
        watch.sees(record)
        if measured is not None and outcome == "accepted":
            scales, after = candidate, measured
        exponents = tuple(exponent / 2 for exponent in exponents)
    problem.place(scales)
    return Learned(
        omega=problem.tensors.by_tensor(scales),
        groups=problem.tensors.scales_of_groups(scales),
        history=history,
        cost=math.fsum(record.cost for record in history) if history else cost,
        after=after,
        micro_batch_size=size,
    )


def most_cost(config: NIOConfig) -> float:
    """Training steps that it may take, the report before not counted."""
    largest = math.log2(config.scale_range[1])
    candidates = 1 + math.floor(math.log2(largest / LEAST_EXPONENT)) if largest >= LEAST_EXPONENT else 0
    return candidates * config.report_batches + (_BALANCING_COST if config.groups == "additive" else 0.0)


def _computed_exponents(problem: ScalingProblem) -> tuple[tuple[float, ...], int | None, float]:
    """(K,) log2 of the scales before any bound, the micro-batch size, and what it cost to find them."""
    config, groups = problem.config, problem.tensors.groups
    factor = max(1.0, preserving_factor(problem.loss.model, problem.tensors))
    computed = dict.fromkeys(groups, factor)
    size, cost = problem.micro_batch_size, 0.0
    if config.groups == "additive" and "additive" in groups:
        problem.place(list(computed.values()))
        additive = [problem.theta[place] for place in groups["additive"]]
        parts = report_parts(config, problem.loss, problem.collective, problem.reported[0], 0)
        computed["additive"] *= balancing_factor(problem.loss, additive, parts, problem.collective, size)
        cost = _BALANCING_COST
    largest = math.log2(config.scale_range[1])
    return tuple(min(config.strength * math.log2(scale), largest) for scale in computed.values()), size, cost


def _outcome(config: NIOConfig, before: GradCosine, measured: GradCosine) -> Outcome:
    most = math.inf if config.loss_bound is None else before.loss + config.loss_bound * abs(before.loss)
    if measured.loss > most:
        return "loss_bound"
    return "least_norm" if measured.grad_norm < (config.least_norm or 0.0) * before.grad_norm else "accepted"


def _largest_group(problem: ScalingProblem) -> int:
    """Position of the group with the most parameters, that of additive tensors left out."""
    sizes = {
        position: sum(problem.initial[member].numel() for member in members)
        for position, (name, members) in enumerate(problem.tensors.groups.items())
        if len(problem.tensors.groups) == 1 or (problem.config.groups, name) != ("additive", "additive")
    }
    return max(sizes, key=sizes.__getitem__)


def _describe(problem: ScalingProblem, scales: Sequence[float]) -> str:
    """A candidate in words, e.g. "all x4"."""
    words = [f"x{scale:.3g}" for scale in scales]
    if len(set(words)) == 1:
        return f"all {words[0]}"
    return ", ".join(f"{group} {word}" for group, word in zip(problem.tensors.groups, words, strict=True))


@torch.no_grad()
def balancing_factor(
    loss: Loss,
    additive: Sequence[Tensor],
    parts: SubBatches,
    collective: Collective,
    micro_batch_size: int | None = None,
) -> float:
    """How many times larger additive tensors p have to be to be as large as the activations a that they are added to.

        factor = ||a|| / ||p|| = cos / sqrt(1 - cos^2)        cos = <h, a> / (||h|| ||a||)

    h = a + p is the input of the first block, a the same with p = 0, over all positions where a is not zero. The angle
    between them tells the ratio of the lengths where p is at right angles to a, also where a normalisation stands
    between the sum and the block, as in BERT. The ratio and its use are our choice.

    Args:
        loss: Loss of the model; only its forward pass is used.
        additive: The additive tensors. They are zero for a while, and have their values back in the end.
        parts: Sub-batches of this process.
        collective: Processes that share the batch.
        micro_batch_size: Samples computed at once; None for a sub-batch.

    Returns:
        The factor, at least 1. It is 1 where the additive tensors do not reach the first block (biases of attention
        scores do not), and for a model without blocks, see [`blocks_of`].
    """
    block = next(iter(blocks_of(loss.model)), None)
    sums = torch.zeros(3, device=loss.device)
    with collective.together():
        for index, part in parts.owned.items():

            def compute(size: int | None, part: Any = part, seed: int = parts.seed_of(index)) -> Tensor:
                with_additive = _inputs(loss, block, part, seed, size)
                with _zeroed(additive):
                    without = _inputs(loss, block, part, seed, size)
                return _products(with_additive, without)

            found, micro_batch_size = on_sub_batch(loss, parts, index, compute, micro_batch_size)
            sums += found.to(loss.device)
    collective.sum_(sums)
    product, squares, squares_without = sums.tolist()
    cosine = product / math.sqrt(squares * squares_without) if squares and squares_without else 1.0
    if cosine > 1 - _LEAST_TURN:
        return 1.0
    return max(1.0, cosine / math.sqrt(1 - cosine**2))


def _inputs(loss: Loss, block: nn.Module | None, batch: Any, seed: int, size: int | None) -> list[Tensor]:
    """The first inputs of a block in the forward passes of a batch, one for each of its parts."""
    caught: list[Tensor] = []
    for number, part in enumerate(chunks(batch, size)):
        found: list[Tensor] = []

        def catch(module: nn.Module, args: Any, kwargs: Any, found: list[Tensor] = found) -> None:
            given = (*args, *kwargs.values())
            found += [value for value in given if isinstance(value, Tensor) and value.is_floating_point()][:1]

        handle = None if block is None else block.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            loss(part, seed, number)
        finally:
            if handle is not None:
                handle.remove()
        caught += [value.detach().clone() for value in found[:1]]
    return caught


def _products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """(3,): <h, a>, ||h||^2 and ||a||^2 over the positions where a is not zero."""
    products = []
    for h, a in zip(left, right, strict=True):
        counted = a.ne(0).any(dim=-1, keepdim=True)
        h, a = (h * counted).float().flatten(), a.float().flatten()
        products.append(torch.stack([torch.dot(h, a), torch.dot(h, h), torch.dot(a, a)]))
    return torch.stack(products).sum(dim=0) if products else torch.zeros(3)


@contextlib.contextmanager
def _zeroed(tensors: Sequence[Tensor]) -> Iterator[None]:
    values = [tensor.clone() for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.zero_()
        yield
    finally:
        torch._foreach_copy_(list(tensors), values)
