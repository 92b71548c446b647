"""The default search of NIO: scales that are computed, and held against bounds.

    c_k = f for all groups, f the factor with which layers keep the variance of their inputs, at least 1, see
          `layers.preserving_factor`
    c_k = f b for additive tensors in front of the first block, such as positions and tokens, b the factor with which
          they are as large as what they are added to, see [`balances`]
    omega_k = c_k^t with the strength t, or half of these exponents, a quarter, ... where that breaks a bound

Nothing is maximised: what GradCosine says of such scales is no guide to training (benchmarks/layer_scales).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nio_hf.core.batches import batch_size, chunks, take
from nio_hf.core.collective import Collective
from nio_hf.core.config import NIOConfig
from nio_hf.core.groups import entries_of
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
_LEAST_CHANGE = 1e-6
"""Relative change of an input below which it is rounding in fp32; our choice."""


@dataclasses.dataclass(frozen=True)
class Balance:
    """Additive tensors that are added to the input of the same block.

    Attributes:
        place: Name of the block in the model.
        members: Their positions among the additive tensors.
        factor: How many times larger they have to be, at least 1.
    """

    place: str
    members: tuple[int, ...]
    factor: float


def balance_scales(problem: ScalingProblem, options: Options, watch: Watch) -> Learned:
    """Compute the scales, and apply as much of them as the bounds allow.

    Raises:
        StoppedError: Where that was asked for.
    """
    started = time.perf_counter()
    groups, exponents, size, cost = _computed_exponents(problem)
    problem = dataclasses.replace(problem, tensors=dataclasses.replace(problem.tensors, groups=groups))
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
        members=groups,
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


def _computed_exponents(
    problem: ScalingProblem,
) -> tuple[Mapping[str, tuple[int, ...]], tuple[float, ...], int | None, float]:
    """The K groups, (K,) log2 of their scales before any bound, the micro-batch size, and what it cost to find them."""
    config, groups = problem.config, problem.tensors.groups
    factor = max(1.0, preserving_factor(problem.loss.model, problem.tensors))
    computed = dict.fromkeys(groups, factor)
    size, cost = problem.micro_batch_size, 0.0
    if config.groups == "additive" and "additive" in groups:
        problem.place(list(computed.values()))
        additive = [problem.tensors.scaled_parameters[place] for place in groups["additive"]]
        parts = report_parts(config, problem.loss, problem.collective, problem.reported[0], 0)
        found = balances(problem.loss, additive, parts, problem.collective, size)
        groups = _regrouped(groups, found)
        computed = dict.fromkeys(groups, factor)
        computed |= {name: factor * each.factor for name, each in zip(groups, found, strict=False)}
        cost = _BALANCING_COST if found else 0.0
    largest = math.log2(config.scale_range[1])
    return groups, tuple(min(config.strength * math.log2(scale), largest) for scale in computed.values()), size, cost


def _regrouped(groups: Mapping[str, tuple[int, ...]], found: Sequence[Balance]) -> dict[str, tuple[int, ...]]:
    """A group for each balance; additive tensors that are in none are among the others."""
    additive = groups["additive"]
    regrouped = {
        "additive" if len(found) == 1 else f"additive ({each.place})": tuple(additive[one] for one in each.members)
        for each in found
    }
    balanced = {*itertools.chain(*regrouped.values())}
    others = tuple(sorted({*additive, *groups.get("others", ())} - balanced))
    return {**regrouped, "others": others} if others else regrouped


def _outcome(config: NIOConfig, before: GradCosine, measured: GradCosine) -> Outcome:
    most = math.inf if config.loss_bound is None else before.loss + config.loss_bound * abs(before.loss)
    if measured.loss > most:
        return "loss_bound"
    return "least_norm" if measured.grad_norm < (config.least_norm or 0.0) * before.grad_norm else "accepted"


def _largest_group(problem: ScalingProblem) -> int:
    """Position of the group with the most parameters, those of additive tensors left out."""
    groups = problem.tensors.groups
    if problem.config.groups == "additive" and "others" in groups:
        return list(groups).index("others")
    sizes = [sum(problem.initial[member].numel() for member in members) for members in groups.values()]
    return sizes.index(max(sizes))


def _describe(problem: ScalingProblem, scales: Sequence[float]) -> str:
    """A candidate in words, e.g. "all x4"."""
    words = [f"x{scale:.3g}" for scale in scales]
    if len(set(words)) == 1:
        return f"all {words[0]}"
    return ", ".join(f"{group} {word}" for group, word in zip(problem.tensors.groups, words, strict=True))


def balances(
    loss: Loss,
    additive: Sequence[nn.Parameter],
    parts: SubBatches,
    collective: Collective,
    micro_batch_size: int | None = None,
) -> list[Balance]:
    """How many times larger additive tensors p have to be to be as large as the activations a that they are added to.

        factor = ||a|| / ||p|| = (<a, a> + <a, d>) / sqrt(<a, a> <d, d> - <a, d>^2)        d = h - a

    h = a + p is the input of the first block, a the same with p = 0, over all positions where a is not zero. The angle
    between them, whose cotangent this is, tells the ratio of the lengths where p is at right angles to a, also where a
    normalisation stands between the sum and the block, as in BERT. The ratio and its use are our choice.

    A model of several towers has several first blocks (see [`entries_of`]), each with a balance of its own. A tensor
    that reaches no input of a first block, such as a bias of attention scores, is in no balance. Nor is any in a model
    without blocks.

    Args:
        loss: Loss of the model.
        additive: Additive tensors, which hold their values again in the end.
        parts: Sub-batches of this process.
        collective: Processes that share the batch.
        micro_batch_size: Samples computed at once; None for a sub-batch.
    """
    entries = entries_of(loss.model)
    members = _members(loss, [*entries.values()], additive, parts, collective)
    balanced = [additive[one] for one in itertools.chain(*members)]
    if not balanced:
        return []
    factors = _factors(loss, [*entries.values()], balanced, parts, collective, micro_batch_size)
    return [Balance(name, own, factor) for name, own, factor in zip(entries, members, factors, strict=True) if own]


def _members(
    loss: Loss, blocks: Sequence[nn.Module], additive: Sequence[nn.Parameter], parts: SubBatches, collective: Collective
) -> list[tuple[int, ...]]:
    """Positions of the additive tensors that the input of each block depends on; no block has one of another's.

    A block whose input depends on weights inside of other blocks, as that of a later stage does, has none.
    """
    flags = torch.zeros(len(blocks), len(additive), dtype=torch.int32, device=loss.device)
    inner = [next((weight for weight in block.parameters() if weight.requires_grad), None) for block in blocks]
    wrt = [*additive, *(weight for weight in inner if weight is not None)]
    with collective.together():
        if collective.rank == 0:
            # Two samples show what depends on what.
            part = take(parts.owned[0], range(min(2, batch_size(parts.owned[0]))))
            for flag, given in zip(flags, _inputs(loss, blocks, part, parts.seed_of(0), None), strict=True):
                if not given or not given[0].requires_grad:
                    continue
                gradients = torch.autograd.grad(given[0].sum(), wrt, allow_unused=True, retain_graph=True)
                reached = [gradient is not None for gradient in gradients]
                if not any(reached[len(additive) :]):
                    flag += torch.tensor(reached[: len(additive)]).to(flag)
    collective.broadcast_(flags)
    first = flags.cumsum(0).eq(1) & flags.bool()
    return [tuple(row.nonzero().flatten().tolist()) for row in first]


@torch.no_grad()
def _factors(
    loss: Loss,
    blocks: Sequence[nn.Module],
    additive: Sequence[Tensor],
    parts: SubBatches,
    collective: Collective,
    micro_batch_size: int | None,
) -> list[float]:
    """The factor at the input of each block, by two forward passes."""
    sums = torch.zeros(len(blocks), 3, device=loss.device)
    with collective.together():
        for index, part in parts.owned.items():

            def compute(size: int | None, part: Any = part, seed: int = parts.seed_of(index)) -> list[Tensor]:
                with_additive = _inputs(loss, blocks, part, seed, size)
                with _zeroed(additive):
                    without = _inputs(loss, blocks, part, seed, size)
                return [_products(*both) for both in zip(with_additive, without, strict=True)]

            found, micro_batch_size = on_sub_batch(loss, parts, index, compute, micro_batch_size)
            for row, products in zip(sums, found, strict=True):
                row += products.to(row.device)
    collective.sum_(sums)
    return [_cotangent(*row) for row in sums.tolist()]


def _cotangent(square: float, product: float, change: float) -> float:
    """The factor, from <a, a>, <a, d> and <d, d>."""
    if change <= _LEAST_CHANGE**2 * square:
        return 1.0
    sine = math.sqrt(max(square * change - product**2, 0.0))
    return max(1.0, (square + product) / sine) if sine > 0 else 1.0


def _inputs(loss: Loss, blocks: Sequence[nn.Module], batch: Any, seed: int, size: int | None) -> list[list[Tensor]]:
    """For each block its first inputs in the forward passes of a batch, one for each part of the batch."""
    caught: list[list[Tensor]] = [[] for _ in blocks]
    for number, part in enumerate(chunks(batch, size)):
        with contextlib.ExitStack() as stack:
            for block, found in zip(blocks, caught, strict=True):

                def catch(
                    module: nn.Module, args: Any, kwargs: Any, found: list[Tensor] = found, number: int = number
                ) -> None:
                    given = (*args, *kwargs.values())
                    floating = [value for value in given if isinstance(value, Tensor) and value.is_floating_point()]
                    if floating and len(found) == number:
                        found.append(floating[0].clone())

                stack.enter_context(block.register_forward_pre_hook(catch, with_kwargs=True))
            loss(part, seed, number)
    return caught


def _products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """(3,): <a, a>, <a, d> and <d, d> with d = h - a, over the positions where a is not zero."""
    products = []
    for h, a in zip(left, right, strict=True):
        counted = a.ne(0).any(dim=-1, keepdim=True)
        d, a = ((h - a) * counted).float().flatten(), a.float().flatten()
        products.append(torch.stack([torch.dot(a, a), torch.dot(a, d), torch.dot(d, d)]))
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
