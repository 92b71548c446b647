"""Which tensors are scaled, which form the gradient, and how the scales reach the weights.

A scaled tensor W_l becomes theta_l = omega_l W_l with a scalar omega_l; m is the number of scaled tensors. The gradient
g is taken over the gradient tensors. Both sets are found by module type and tensor identity; names count only where a
pattern is given.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from nio_hf.core.config import ScaledTensors, ScaleSharing
from nio_hf.core.result import ExcludedTensor, TensorScale
from nio_hf.errors import ModelError, Problem

MIN_COVERAGE = 0.9
_NORM_SUFFIXES = ("RMSNorm", "LayerNorm")

_GRADIENT_MODULES: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Bilinear: "linear",
    nn.MultiheadAttention: "attention",
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), "convolution"),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "convolution"),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), "norm"),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), "norm"),
    **dict.fromkeys((nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), "norm"),
}


def register_gradient_module(module_type: type[nn.Module], kind: str) -> None:
    """Count the tensors that modules of a type own among the gradient tensors.

    Args:
        module_type: a linear, convolution or normalisation layer of another library; subclasses are included.
        kind: "linear", "convolution" or "norm", the group that it is shown in.
    """
    _GRADIENT_MODULES[module_type] = kind


@dataclasses.dataclass(frozen=True)
class TensorPlace:
    """A parameter with its place in the model."""

    name: str
    parameter: nn.Parameter
    kind: str
    depth: int
    in_gradient: bool


class LayerScales:
    """The scaled tensors and the gradient tensors of a model.

    Args:
        model: any module with fp32 or fp64 parameters that hold data.
        scaled_tensors: which tensors are scaled, as in [`NIOConfig`].
        scaled_names: likewise, by name.

    Attributes:
        gradient: the gradient parameters: trainable and owned by a registered module type.
        excluded: the parameters that are not scaled, with the reason.

    Raises:
        ModelError: for parameters on the meta device, sharded or in half precision, a model without trainable or
            without scalable tensors, and one whose gradient tensors hold less than 90% of the numbers in trainable
            tensors of two or more dimensions outside embeddings.
    """

    def __init__(
        self, model: nn.Module, scaled_tensors: ScaledTensors = "all", scaled_names: str | None = None
    ) -> None:
        check_storage(model)
        self._tensors = _locate_tensors(model)
        trainable = [tensor for tensor in self._tensors if tensor.parameter.requires_grad]
        if not trainable:
            raise ModelError(
                Problem(type(model).__name__, "no parameter requires a gradient", "Unfreeze the tensors to initialise")
            )
        self.excluded = [_excluded(tensor, "frozen") for tensor in self._tensors if not tensor.parameter.requires_grad]
        nonzero = torch.stack([tensor.parameter.detach().any() for tensor in trainable]).tolist()
        self._scaled = [tensor for tensor, any_value in zip(trainable, nonzero, strict=True) if any_value]
        if scaled_tensors == "weights":
            self._leave_out("vector", [tensor for tensor in self._scaled if tensor.parameter.ndim < 2])
        if scaled_names is not None:
            self._leave_out("name", [tensor for tensor in self._scaled if not re.search(scaled_names, tensor.name)])
        self.excluded += [
            _excluded(t, "zero") for t, any_value in zip(trainable, nonzero, strict=True) if not any_value
        ]
        self.gradient = [tensor.parameter for tensor in trainable if tensor.in_gradient]
        self._check_scalable(model)
        _check_coverage(model, self.gradient)

    @property
    def scaled(self) -> list[nn.Parameter]:
        """The m scaled parameters: trainable and not exactly zero, tied ones once, in parameter order."""
        return [tensor.parameter for tensor in self._scaled]

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Scaled and gradient tensors together, each once."""
        return list(dict.fromkeys([*self.scaled, *self.gradient]))

    def gradient_places(self) -> list[TensorPlace]:
        """The gradient tensors with their places in the model, in the order of `gradient`."""
        places = {id(tensor.parameter): tensor for tensor in self._tensors}
        return [places[id(parameter)] for parameter in self.gradient]

    def sharing(self, sharing: ScaleSharing) -> Tensor:
        """(m,) number of the scale that each scaled tensor has, where tensors share them."""
        if sharing == "tensor":
            return torch.arange(len(self._scaled))
        kinds = [tensor.kind if sharing == "kind" else "" for tensor in self._scaled]
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
        return torch.tensor([numbers[kind] for kind in kinds])

    def name_of(self, parameter: nn.Parameter) -> str:
        """Name of a parameter in memory, for messages."""
        return next(tensor.name for tensor in self._tensors if tensor.parameter is parameter)

    def drop_unused(self, model: nn.Module, unused: Sequence[nn.Parameter]) -> None:
        """Leave out tensors that no gradient reaches.

        Raises:
            ModelError: where no scaled or no gradient tensor is left.
        """
        identities = {id(parameter) for parameter in unused}
        self._leave_out("unused", [tensor for tensor in self._scaled if id(tensor.parameter) in identities])
        self.gradient = [parameter for parameter in self.gradient if id(parameter) not in identities]
        self._check_scalable(model)

    def report(self, omega: Tensor) -> tuple[TensorScale, ...]:
        """The scaled tensors with their scales, omega of shape (m,)."""
        return tuple(
            TensorScale(tensor.name, tensor.kind, tensor.depth, tuple(tensor.parameter.shape), value)
            for tensor, value in zip(self._scaled, omega.tolist(), strict=True)
        )

    @contextlib.contextmanager
    def substituted(self) -> Iterator[list[Tensor]]:
        """Let the parameters hold copies of their values, and put the originals back on the way out.

        Yields:
            The original values of the scaled tensors, W_l.
        """
        parameters = self.trainable
        originals = [parameter.data for parameter in parameters]
        by_identity = {id(parameter): data for parameter, data in zip(parameters, originals, strict=True)}
        try:
            for parameter, data in zip(parameters, originals, strict=True):
                parameter.data = data.clone()
            yield [by_identity[id(parameter)] for parameter in self.scaled]
        finally:
            for parameter, data in zip(parameters, originals, strict=True):
                parameter.data = data

    @torch.no_grad()
    def apply(self, values: Sequence[Tensor]) -> None:
        """Give the scaled tensors new values, in place."""
        torch._foreach_copy_([parameter.data for parameter in self.scaled], list(values))

    def _leave_out(self, reason: str, tensors: Sequence[TensorPlace]) -> None:
        """Do not scale these tensors."""
        self.excluded += [_excluded(tensor, reason) for tensor in tensors]
        left_out = {tensor.name for tensor in tensors}
        self._scaled = [tensor for tensor in self._scaled if tensor.name not in left_out]

    def _check_scalable(self, model: nn.Module) -> None:
        where = type(model).__name__
        if not self._scaled:
            reasons = collections.Counter(tensor.reason for tensor in self.excluded)
            found = "no tensor can be scaled (" + ", ".join(f"{n} {reason}" for reason, n in reasons.items()) + ")"
            raise ModelError(
                Problem(where, found, "Give a model with a trainable tensor that is used and not all zero")
            )
        if not self.gradient:
            found = "no linear, convolution or normalisation layer is trainable and used"
            fix = "Register the layer types of the model with nio_hf.core.register_gradient_module"
            raise ModelError(Problem(where, found, fix))


def check_storage(model: nn.Module) -> None:
    """Refuse parameters that NIO cannot compute with.

    Raises:
        ModelError: for parameters on the meta device, sharded over processes, or trainable in half precision, of
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
    owners: dict[int, list[tuple[str, nn.Module]]] = collections.defaultdict(list)
    for module_name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append((module_name, module))
    blocks = _enclosing_blocks(model)
    depths: dict[str | None, int] = {}
    tensors = []
    for name, parameter in model.named_parameters():
        module_name, first_owner = owners[id(parameter)][0]
        block = blocks[module_name]
        if depths or block is not None:
            depths.setdefault(block, len(depths) + 1)
        tensors.append(
            TensorPlace(
                name=name,
                parameter=parameter,
                kind=_kind(first_owner, parameter),
                depth=depths.get(block, 0),
                in_gradient=any(_module_kind(owner) is not None for _, owner in owners[id(parameter)]),
            )
        )
    return tensors


def _module_kind(module: nn.Module) -> str | None:
    """Group of a registered module type; libraries define normalisation layers of their own, known by their suffix."""
    kinds = (_GRADIENT_MODULES.get(base) for base in type(module).__mro__)
    own_norm = type(module).__name__.endswith(_NORM_SUFFIXES) and all(p.ndim <= 1 for p in module.parameters())
    return next((kind for kind in kinds if kind is not None), "norm" if own_norm else None)


def _kind(owner: nn.Module, parameter: nn.Parameter) -> str:
    if isinstance(owner, nn.Embedding):
        return "embedding"
    module_kind = _module_kind(owner)
    if module_kind is None:
        return "parameter"
    is_bias = parameter is getattr(owner, "bias", None) or (module_kind != "norm" and parameter.ndim == 1)
    return f"{module_kind} {'bias' if is_bias else 'weight'}"


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


def _excluded(tensor: TensorPlace, reason: str) -> ExcludedTensor:
    return ExcludedTensor(tensor.name, tensor.kind, tuple(tensor.parameter.shape), reason)


def _check_coverage(model: nn.Module, gradient: Sequence[nn.Parameter]) -> None:
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    covered = {id(parameter) for parameter in gradient}
    missing: collections.Counter[str] = collections.Counter()
    total = 0
    counted: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            # Tokens and position embeddings that are plain parameters have a leading dimension of 1.
            matrix = parameter.ndim >= 2 and parameter.shape[0] > 1 and id(parameter) not in embeddings
            if not (matrix and parameter.requires_grad) or id(parameter) in counted:
                continue
            counted.add(id(parameter))
            total += parameter.numel()
            if id(parameter) not in covered:
                missing[type(module).__name__] += parameter.numel()
    if missing.total() > (1 - MIN_COVERAGE) * total:
        found = (
            f"the known layer types hold {1 - missing.total() / total:.0%} of the {total:,} numbers in weight "
            "matrices; unknown: " + ", ".join(f"{name} ({count:,})" for name, count in missing.most_common())
        )
        fix = "Register these classes with nio_hf.core.register_gradient_module(module_type, kind)"
        raise ModelError(Problem(type(model).__name__, found, fix))
