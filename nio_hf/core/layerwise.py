"""GradCosine and gradient norm tensor by tensor: the layers whose gradients agree between sub-batches.

Letters: D sub-batches, h_d the unit gradient of sub-batch d, h_{d,l} its slice in gradient tensor l. With
u_l = sum_d h_{d,l} and E_l = sum_d ||h_{d,l}||^2,

    share          s_l = E_l / D                            sum_l s_l = 1
    contribution   c_l = (||u_l||^2 - E_l) / (D (D - 1))    sum_l c_l = GC
    agreement      a_l = c_l / s_l                          GC = sum_l s_l a_l

a_l is the mean inner product of the slices of two sub-batches over their mean squared norm, in [-1 / (D - 1), 1]: 1
where all slices are equal. It is no cosine: two parallel slices whose norms are as 1 to 3 give 0.6. Shares and
contributions are sums over tensors, so groups of tensors add up likewise.

Source: our choice, from the definition of GradCosine in Yang et al., NeurIPS 2022, section 4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nio_hf.core import mode
from nio_hf.core.collective import Collective
from nio_hf.core.config import NIOConfig
from nio_hf.core.loss import Loss, LossFn, make_loss
from nio_hf.core.problem import report_parts
from nio_hf.core.records import restored
from nio_hf.core.result import GradCosine
from nio_hf.core.sub_batches import measure
from nio_hf.core.tensors import ModelTensors, find_tensors
from nio_hf.errors import DataError, Problem

Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class LayerGradient:
    """The gradient of one tensor, or of a group of tensors, over D sub-batches.

    Attributes:
        name: Name of the tensor in memory, or of the group.
        kind: Kind of the tensor, see [`kinds_of`].
        depth: Position of the enclosing block, 0 for what comes before the first block.
        parameters: Number of its elements.
        share: s_l, part of the squared norm of the unit gradients; all shares sum to 1.
        contribution: c_l, part of GC; all contributions sum to GC.
        grad_norm: Root mean square over the sub-batches of the norm of its gradient.
    """

    name: str
    kind: str
    depth: int
    parameters: int
    share: float
    contribution: float
    grad_norm: float

    @property
    def agreement(self) -> float:
        """a_l, the mean inner product of two sub-batches over the mean squared norm; NaN where the gradient is zero."""
        return self.contribution / self.share if self.share > 0 else math.nan


@dataclasses.dataclass(frozen=True)
class GradientInspection:
    """Measurements of [`inspect_gradients`].

    Attributes:
        measured: GC, GN and loss of the whole gradient, the mean over the batches.
        layers: Gradient tensors in parameter order, each the mean over the batches.
    """

    measured: GradCosine
    layers: tuple[LayerGradient, ...]

    def grouped(self, key: Callable[[LayerGradient], Key]) -> dict[Key, LayerGradient]:
        """Groups of tensors, by what `key` gives for each, in the order of their first tensors."""
        groups: dict[Key, list[LayerGradient]] = {}
        for layer in self.layers:
            groups.setdefault(key(layer), []).append(layer)
        return {value: _together(str(value), members) for value, members in groups.items()}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; the agreement of a tensor whose gradient is zero is None."""
        layers = [
            {**dataclasses.asdict(layer), "agreement": layer.agreement if layer.share > 0 else None}
            for layer in self.layers
        ]
        return {"measured": dataclasses.asdict(self.measured), "layers": layers}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> GradientInspection:
        """Inverse of `to_dict`; what else has been written beside it is left out."""
        layers = [{key: value for key, value in layer.items() if key != "agreement"} for layer in fields["layers"]]
        inspection: GradientInspection = restored(cls, {"measured": fields["measured"], "layers": layers})
        return inspection


def inspect_gradients(
    model: nn.Module, batches: Iterable[Any], loss_fn: LossFn, config: NIOConfig | None = None
) -> GradientInspection:
    """Measure where in a model the gradients of sub-batches agree; the model is left as it is.

    Works at any point of a training. At the same settings, on the report batches of [`initialize`], `measured` is
    what that gives as `before` and, with the learned scales, as `after`.

    Args:
        model: Module with fp32 or fp64 parameters.
        batches: At least one batch: mappings, tuples or tensors, samples along dimension 0.
        loss_fn: (model, batch) -> mean loss, or (loss_sum, weight).
        config: `sub_batches`, `micro_batch_size`, `precision` and `seed` are used; None for the defaults.

    Returns:
        GC, GN and loss, and what each gradient tensor has in them.

    Raises:
        DataError: Without a batch.
        ConfigError, ModelError, NumericsError: As in [`initialize`].
    """
    config = NIOConfig() if config is None else config
    tensors = find_tensors(model)
    loss = make_loss(model, loss_fn, config, tensors.device)
    with mode.isolated(model, tensors.device):
        readings = [_inspect(loss, tensors, batch, number, config) for number, batch in enumerate(batches)]
    if not readings:
        raise DataError(Problem("batches", "none", "Give at least one batch"))
    by_tensor = torch.stack([torch.stack(reading[1:]) for reading in readings]).mean(0)
    layers = (
        LayerGradient(
            place.name, place.kind, place.depth, place.parameter.numel(), share, contribution, math.sqrt(squared_norm)
        )
        for place, share, contribution, squared_norm in zip(tensors.gradient, *by_tensor.tolist(), strict=True)
    )
    return GradientInspection(GradCosine.mean([reading[0] for reading in readings]), tuple(layers))


def _inspect(
    loss: Loss, tensors: ModelTensors, batch: Any, number: int, config: NIOConfig
) -> tuple[GradCosine, Tensor, Tensor, Tensor]:
    """GC of a batch; of each gradient tensor share, contribution and mean squared norm, each of shape (tensors,)."""
    alone, count = Collective(), config.sub_batches
    parts = report_parts(config, loss, alone, batch, number)
    squared_norms: list[Tensor] = []

    def observe(gradient: Sequence[Tensor]) -> None:
        squared_norms.append(torch.stack(torch._foreach_norm(list(gradient))).square())

    first, measured = measure(loss, tensors, parts, alone, micro_batch_size=config.micro_batch_size, observe=observe)
    per_part = torch.stack(squared_norms).double()
    energies = (per_part / per_part.sum(1, keepdim=True)).sum(0)
    unit_sums = torch.stack(torch._foreach_norm(first.sums.unit_sum)).double().square()
    return measured, energies / count, (unit_sums - energies) / (count * (count - 1)), per_part.mean(0)


def _together(name: str, members: Sequence[LayerGradient]) -> LayerGradient:
    kinds = {member.kind for member in members}
    return LayerGradient(
        name=name,
        kind=kinds.pop() if len(kinds) == 1 else "several",
        depth=min(member.depth for member in members),
        parameters=sum(member.parameters for member in members),
        share=math.fsum(member.share for member in members),
        contribution=math.fsum(member.contribution for member in members),
        grad_norm=math.hypot(*(member.grad_norm for member in members)),
    )
