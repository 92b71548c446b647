"""The squared gradient at the initialisation, which Adam's second moment can start from.

Source: Kalra and Barkeshli, "Why Warmup the Learning Rate? Underlying Mechanisms and Improvements", NeurIPS 2024,
arXiv 2406.09405, section on GI-Adam.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nio_hf.core import mode
from nio_hf.core.collective import Collective
from nio_hf.core.config import NIOConfig
from nio_hf.core.differentiator import Differentiator, LossFn, dense
from nio_hf.core.loop import held_out_seed
from nio_hf.core.method import SINGLE_PROCESS
from nio_hf.core.scales import LayerScales
from nio_hf.core.two_pass import TwoPass, located
from nio_hf.errors import DataError, NumericsError, Problem

_CLIP_EPS = 1e-6
"""What `torch.nn.utils.clip_grad_norm_` adds to a norm."""


def squared_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    config: NIOConfig | None = None,
    *,
    max_norm: float | None = None,
    collective: Collective = SINGLE_PROCESS,
) -> dict[str, Tensor]:
    """Mean over batches of the squared gradient g^2, elementwise, with g the gradient of the mean loss of a batch.

    With `max_norm` c it is that of min(1, c / ||g||) g, which an optimizer sees where gradients are clipped. The model
    is left as it is. Each batch costs one forward and one backward.

    Args:
        model: a module with fp32 or fp64 parameters.
        batches: at least one batch: mappings, tuples or tensors, samples along dimension 0.
        loss_fn: (model, batch) -> mean loss, or (loss_sum, weight).
        config: `sub_batches`, `micro_batch_size`, `precision`, `batch_norm` and `seed` are used; None for the defaults.
            A batch is computed in sub-batches, which processes share; they do not change the result, but for batch
            normalisation.
        max_norm: norm above which the gradient of a batch, of all parameters together, is clipped; None for none.
        collective: the processes that share the work, each of which passes the same batches and the same weights.

    Returns:
        {parameter name: tensor of its shape} of all trainable parameters, zero where no gradient reaches one.

    Raises:
        DataError: without a batch.
        NumericsError: for a gradient that is not finite.
        ConfigError, ModelError: as in [`initialize`].
    """
    config = NIOConfig() if config is None else config
    with collective.together():
        scales = LayerScales(model)
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        wrt = list(named.values())
        autocast = torch.bfloat16 if config.precision == "bf16" else None
        differentiator = Differentiator(model, loss_fn, scales, config.micro_batch_size, autocast)
        passes = TwoPass(model, differentiator, scales, collective, config.batch_norm)
        totals, count = [torch.zeros_like(parameter) for parameter in wrt], 0
        with mode.isolated(model, wrt[0].device, config.batch_norm):
            for index, batch in enumerate(batches):
                gradient = _gradient(passes, batch, wrt, config, index)
                if max_norm is not None:
                    _clip(gradient, max_norm)
                torch._foreach_addcmul_(totals, gradient, gradient)
                count += 1
    if not count:
        raise DataError(Problem("batches", "none", "Give at least one batch"))
    torch._foreach_div_(totals, count)
    for name, total in zip(named, totals, strict=True):
        if not total.isfinite().all():
            fix = "Check inputs, labels and the initial weights"
            raise NumericsError(Problem(name, "the squared gradient is not finite", fix))
    return dict(zip(named, totals, strict=True))


def _clip(gradient: list[Tensor], max_norm: float) -> None:
    """Clip a gradient as torch does."""
    norm = torch.nn.utils.get_total_norm(gradient)
    torch._foreach_mul_(gradient, (max_norm / (norm + _CLIP_EPS)).clamp(max=1.0))


def _gradient(passes: TwoPass, batch: Any, wrt: list[nn.Parameter], config: NIOConfig, index: int) -> list[Tensor]:
    """The gradient of the mean loss of a batch, summed over the sub-batches of all processes by their weights."""
    differentiator, where = passes.differentiator, f"batch {index}"
    parts = passes.split(batch, config.sub_batches, seed=held_out_seed(config.seed, index))
    total = [torch.zeros_like(parameter) for parameter in wrt]
    weights = wrt[0].new_zeros(1)
    with passes.statistics(batch):
        for position, part in parts.owned.items():
            differentiator.seed = parts.seed * parts.count + position
            with located(f"{where}, sub-batch {position}"):
                compute = functools.partial(differentiator.gradient, part, wrt)
                grads, _, weight = passes.back_off.run(compute, part, where)
            scale = float(weight)
            torch._foreach_add_(total, dense(grads, wrt), alpha=scale)
            weights += scale
    for tensor in (*total, weights):
        passes.collective.sum_(tensor)
    torch._foreach_div_(total, weights.item())
    return total
