"""The scaled tensors of a model, and the way from scales to weights.

A scaled tensor W_l becomes theta_l = omega_l W_l with a scalar omega_l; m is the number of scaled tensors, K that of
the groups that share a scale. The gradient g is taken over all trainable tensors that the loss depends on, but for
those that are exactly zero: normalisation has no derivative at a token of zeros, and whatever comes near that outweighs
all other gradients. Names count only in the groups of a user.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from nio_hf.core.config import ScaledTensors
from nio_hf.core.groups import Kind, group_tensors, kinds_of
from nio_hf.core.result import ExcludedTensor, GroupScale, TensorScale
from nio_hf.errors import ModelError, Problem

_VECTORS: tuple[Kind, ...] = ("norm", "bias", "vector")


@dataclasses.dataclass(frozen=True)
class TensorPlace:
    """A parameter with its place in the model.

    Attributes:
        name: Name in the model, for messages.
        parameter: The parameter.
        kind: Kind of the tensor, see [`kinds_of`].
        depth: Position of the enclosing block, 0 for what comes before the first block.
    """

    name: str
    parameter: nn.Parameter
    kind: Kind
    depth: int


@dataclasses.dataclass(frozen=True)
class ModelTensors:
    """The tensors of a model.

    Attributes:
        places: All parameters, tied ones once, in parameter order.
        scaled: M scaled tensors W_l: trainable, not exactly zero, and in a group.
        gradient: Gradient tensors: trainable, used and not exactly zero, the scaled ones among them.
        trainable: Gradient tensors, and trainable ones that are zero.
        groups: {name of a group: positions of its tensors in `scaled`}; the K groups are a partition.
        excluded: Parameters that are not scaled, with the reason.
    """

    places: tuple[TensorPlace, ...]
    scaled: tuple[TensorPlace, ...]
    gradient: tuple[TensorPlace, ...]
    trainable: tuple[TensorPlace, ...]
    groups: Mapping[str, tuple[int, ...]]
    excluded: tuple[ExcludedTensor, ...]

    @property
    def scaled_parameters(self) -> list[nn.Parameter]:
        """The m scaled parameters."""
        return [place.parameter for place in self.scaled]

    @property
    def gradient_parameters(self) -> list[nn.Parameter]:
        """The gradient parameters."""
        return [place.parameter for place in self.gradient]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.scaled[0].parameter.device

    @property
    def zero_heads(self) -> list[str]:
        """Names of the weight matrices behind the last block that are all zero: no gradient passes them."""
        return [
            tensor.name
            for tensor in self.excluded
            if (tensor.reason, tensor.kind) == ("zero", "head") and len(tensor.shape) > 1
        ]

    def by_tensor(self, by_group: Sequence[float]) -> list[float]:
        """(m,) value of each scaled tensor, from that of its group (K,)."""
        values = [0.0] * len(self.scaled)
        for value, members in zip(by_group, self.groups.values(), strict=True):
            for position in members:
                values[position] = value
        return values

    def scales_of_groups(self, by_group: Sequence[float]) -> tuple[GroupScale, ...]:
        """The groups with their scales (K,)."""
        return tuple(
            GroupScale(name, omega, len(members), sum(self.scaled[member].parameter.numel() for member in members))
            for (name, members), omega in zip(self.groups.items(), by_group, strict=True)
        )

    def report(self, omega: Sequence[float]) -> tuple[TensorScale, ...]:
        """The scaled tensors with their scales, omega of shape (m,)."""
        group_of = {position: group for group, members in self.groups.items() for position in members}
        return tuple(
            TensorScale(place.name, place.kind, place.depth, tuple(place.parameter.shape), value, group_of[position])
            for position, (place, value) in enumerate(zip(self.scaled, omega, strict=True))
        )


def find_tensors(
    model: nn.Module,
    scaled_tensors: ScaledTensors = "all",
    groups: str | Mapping[str, str] = "tensor",
    unused: Collection[str] = (),
    larger: Collection[str] = (),
) -> ModelTensors:
    """Find the tensors of a model that are scaled, their groups, and those that the gradient is taken over.

    Args:
        model: Any module with fp32 or fp64 parameters that hold data.
        scaled_tensors: Setting of [`NIOConfig`] that says which tensors are scaled.
        groups: Setting of [`NIOConfig`] that says which tensors share a scale.
        unused: Names of tensors that no gradient reaches.
        larger: Names of tensors that were drawn larger on purpose, and are not scaled.

    Raises:
        ModelError: Parameters on the meta device, sharded or in half precision, and a model without trainable or
            without scalable tensors.
        ConfigError: Groups that do not fit the model, see [`group_tensors`].
    """
    check_storage(model)
    places = _locate_tensors(model)
    trainable = [place for place in places if place.parameter.requires_grad]
    if not trainable:
        raise ModelError(
            Problem(type(model).__name__, "no parameter requires a gradient", "Unfreeze the tensors to initialise")
        )
    reasons = {place.name: "frozen" for place in places if not place.parameter.requires_grad}
    has_values = torch.stack([place.parameter.detach().any() for place in trainable]).tolist()
    reasons |= {place.name: "zero" for place, nonzero in zip(trainable, has_values, strict=True) if not nonzero}
    reasons |= dict.fromkeys(unused, "unused")
    used = [place for place in trainable if place.name not in unused]
    reasons |= dict.fromkeys(larger, "larger")
    candidates = [place for place in used if place.name not in reasons]
    if scaled_tensors == "weights" and not isinstance(groups, Mapping):
        reasons |= {place.name: "vector" for place in candidates if place.kind in _VECTORS}
        candidates = [place for place in candidates if place.name not in reasons]
    scalable = {place.name: place.kind for place in candidates}
    by_group = group_tensors(model, scalable, groups) if candidates else {}
    grouped = {name for members in by_group.values() for name in members}
    reasons |= {place.name: "no group" for place in candidates if place.name not in grouped}
    scaled = tuple(place for place in candidates if place.name in grouped)
    position = {place.name: number for number, place in enumerate(scaled)}
    found = ModelTensors(
        places=tuple(places),
        scaled=scaled,
        gradient=tuple(place for place in used if reasons.get(place.name) != "zero"),
        trainable=tuple(used),
        groups={group: tuple(position[name] for name in members) for group, members in by_group.items()},
        excluded=tuple(
            ExcludedTensor(place.name, place.kind, tuple(place.parameter.shape), reasons[place.name])
            for place in places
            if place.name in reasons
        ),
    )
    _check_scalable(model, found)
    return found


@contextlib.contextmanager
def copied_values(tensors: ModelTensors) -> Iterator[list[Tensor]]:
    """Let the parameters hold copies of their values, and put the originals back on the way out.

    Yields:
        The original values of the scaled tensors, W_l.
    """
    parameters = [place.parameter for place in tensors.trainable]
    originals = {parameter: parameter.data for parameter in parameters}
    try:
        for parameter, data in originals.items():
            parameter.data = data.clone()
        yield [originals[parameter] for parameter in tensors.scaled_parameters]
    finally:
        for parameter, data in originals.items():
            parameter.data = data


@torch.no_grad()
def set_scales(tensors: ModelTensors, initial: Sequence[Tensor], omega: Sequence[float]) -> None:
    """theta_l = omega_l W_l, in place, with omega of shape (m,)."""
    torch._foreach_copy_(
        [parameter.data for parameter in tensors.scaled_parameters], torch._foreach_mul(list(initial), list(omega))
    )


def _check_scalable(model: nn.Module, found: ModelTensors) -> None:
    where = type(model).__name__
    if not found.scaled:
        reasons = collections.Counter(tensor.reason for tensor in found.excluded)
        counts = "no tensor can be scaled (" + ", ".join(f"{n} {reason}" for reason, n in reasons.items()) + ")"
        fix = "Give a model with a trainable tensor that is used and not all zero"
        if "vector" in reasons:
            fix = 'Set NIOConfig.scaled_tensors to "all", which scales what is no matrix, table or token, too'
        raise ModelError(Problem(where, counts, fix))


def check_storage(model: nn.Module) -> None:
    """Refuse parameters that NIO cannot compute with.

    Raises:
        ModelError: Parameters on the meta device, sharded over processes, or trainable in half precision, of
            different precision, or distinct in the same memory; and for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(Problem("model", f"a {type(model).__name__}", "Give a torch.nn.Module"))
    problems = []
    first_at: dict[int, str] = {}
    precision = next((p.dtype for p in model.parameters() if p.requires_grad), torch.float32)
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            problems.append(Problem(name, "on the meta device, without data", "Materialise the model first"))
        elif hasattr(tensor, "placements") or hasattr(tensor, "ds_id"):
            problems.append(Problem(name, "sharded over processes", "Give NIO the whole model"))
        elif tensor.dtype not in (torch.float32, torch.float64) and tensor.requires_grad:
            fix = "Load the model with dtype=torch.float32; mixed precision belongs to the training"
            problems.append(Problem(name, f"dtype {tensor.dtype}", fix))
        elif tensor.requires_grad and tensor.dtype != precision:
            fix = f"Convert the model to one precision, e.g. model.to({precision})"
            problems.append(Problem(name, f"dtype {tensor.dtype} beside {precision}", fix))
        elif tensor.numel() and first_at.setdefault(tensor.data_ptr(), name) != name:
            found = f"another parameter in the memory of {first_at[tensor.data_ptr()]}"
            problems.append(Problem(name, found, "Tie tensors by assigning the Parameter itself"))
    if problems:
        more = [] if len(problems) == 1 else [Problem("model", f"{len(problems)} such tensors", "The first is named")]
        raise ModelError(problems[0], *more)


def _locate_tensors(model: nn.Module) -> list[TensorPlace]:
    kinds, blocks = kinds_of(model), _enclosing_blocks(model)
    depths: dict[str | None, int] = {}
    places = []
    for name, parameter in model.named_parameters():
        block = blocks[name.rpartition(".")[0]]
        if depths or block is not None:
            depths.setdefault(block, len(depths) + 1)
        places.append(TensorPlace(name, parameter, kinds[name], depths.get(block, 0)))
    return places


def _enclosing_blocks(model: nn.Module) -> dict[str, str | None]:
    """For each module, the innermost element of a ModuleList or Sequential around it; layers in a block are none."""
    blocks: dict[str, str | None] = {"": None}
    for name, module in model.named_modules():
        for child_name, child_module in module.named_children():
            child = f"{name}.{child_name}" if name else child_name
            is_layer = blocks[name] is not None and not any(child_module.children())
            is_block = isinstance(module, nn.ModuleList | nn.Sequential) and not is_layer
            blocks[child] = child if is_block else blocks[name]
    return blocks
