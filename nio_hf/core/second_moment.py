"""The squared gradient at the initialisation, which Adam's second moment can start from.

Source: Kalra and Barkeshli, "Why Warmup the Learning Rate? Underlying Mechanisms and Improvements", NeurIPS 2024,
arXiv 2406.09405, section on GI-Adam. The estimate for another batch size is ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nio_hf.core import mode
from nio_hf.core.collective import Collective
from nio_hf.core.config import NIOConfig
from nio_hf.core.loss import LossFn, dense_gradient, make_loss
from nio_hf.core.problem import report_parts
from nio_hf.core.sub_batches import on_sub_batch, refuse_zero_heads
from nio_hf.core.tensors import find_tensors
from nio_hf.errors import DataError, NumericsError, Problem

_CLIP_EPS = 1e-6
"""Number that `torch.nn.utils.clip_grad_norm_` adds to a norm."""


def squared_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    config: NIOConfig | None = None,
    *,
    training_batch_size: int | None = None,
    max_norm: float | None = None,
    collective: Collective | None = None,
) -> dict[str, Tensor]:
    """E[g^2], elementwise, of the gradient g of a training batch of B_t samples.

    With n sub-batches of b samples each, their gradients g_j, mean m and unbiased variance s^2 over them, s^2 estimates
    V / b for the variance V over samples, and m^2 overestimates the squared mean gradient by s^2 / n. So

        E[g^2] = max(m^2 - s^2 / n, 0) + s^2 b / B_t

    With `max_norm` c it is that of a clipped gradient: times min(1, c / sqrt(sum of E[g^2]))^2. The model is left as it
    is. Each batch costs one forward and one backward.

    Args:
        model: Module with fp32 or fp64 parameters.
        batches: At least one batch: mappings, tuples or tensors, samples along dimension 0.
        loss_fn: (model, batch) -> mean loss, or (loss_sum, weight).
        config: `sub_batches`, `micro_batch_size`, `precision` and `seed` are used; None for the defaults.
        training_batch_size: B_t, samples that one step of the optimizer sees; None for that of the batches.
        max_norm: Norm above which the gradient of all parameters together is clipped; None for no clipping.
        collective: Processes that share the work, as in [`initialize`]; None for this one.

    Returns:
        {parameter name: tensor of its shape} of all trainable parameters, zero where no gradient reaches one.

    Raises:
        DataError: Without a batch.
        NumericsError: A gradient that is not finite, and for a head that is zero, behind which all others are.
        ConfigError, ModelError: As in [`initialize`].
    """
    config = NIOConfig() if config is None else config
    processes = Collective() if collective is None else collective
    with processes.together():
        tensors = find_tensors(model)
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        wrt = list(named.values())
        loss = make_loss(model, loss_fn, config, tensors.device)
        total, squares = ([torch.zeros_like(parameter) for parameter in wrt] for _ in range(2))
        size, count, samples, number = config.micro_batch_size, 0, 0, 0
        with mode.isolated(model, tensors.device):
            for number, batch in enumerate(batches):
                parts = report_parts(config, loss, processes, batch, number)
                count += parts.count
                samples += parts.batch_size
                for index, part in parts.owned.items():

                    def compute(micro: int | None, part: Any = part, seed: int = parts.seed_of(index)) -> list[Tensor]:
                        return dense_gradient(loss, part, wrt, seed=seed, micro_batch_size=micro)[0]

                    own, size = on_sub_batch(loss, parts, index, compute, size)
                    torch._foreach_add_(total, own)
                    torch._foreach_addcmul_(squares, own, own)
    if not count:
        raise DataError(Problem("batches", "none", "Give at least one batch"))
    for tensor in (*total, *squares):
        processes.sum_(tensor)
    found = _expected_squares(total, squares, count, samples / count, training_batch_size or samples / (number + 1))
    for name, square in zip(named, found, strict=True):
        if not square.isfinite().all():
            fix = "Check inputs, labels and the initial weights"
            raise NumericsError(Problem(name, "the squared gradient is not finite", fix))
    if not any(bool(square.any()) for square, parameter in zip(found, wrt, strict=True) if bool(parameter.any())):
        refuse_zero_heads(tensors)
    if max_norm is not None:
        norm = torch.stack([square.sum() for square in found]).sum().sqrt()
        torch._foreach_mul_(found, (max_norm / (norm + _CLIP_EPS)).clamp(max=1.0).square())
    return dict(zip(named, found, strict=True))


def _expected_squares(
    total: list[Tensor], squares: list[Tensor], count: int, part_size: float, training_batch_size: float
) -> list[Tensor]:
    """E[g^2] from the sums of the gradients of `count` sub-batches and of their squares, tensor by tensor."""
    found = []
    for sum_of, sum_of_squares in zip(total, squares, strict=True):
        mean = sum_of / count
        variance = ((sum_of_squares / count - mean.square()) * count / max(count - 1, 1)).clamp_min(0)
        signal = (mean.square() - variance / count).clamp_min(0)
        found.append(signal + variance * part_size / training_batch_size)
    return found
