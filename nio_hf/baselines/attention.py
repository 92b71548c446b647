"""The projections of attention layers, one by one, also where a layer holds them in one weight."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn

from nio_hf.core.tensors import ModelTensors
from nio_hf.errors import ModelError, Problem

_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))
_FUSED = ("qkv", "c_attn")
_OUTPUTS = ("o_proj", "out_proj", "proj", "c_proj")
_HEADS = ("num_heads", "num_attention_heads", "n_heads")


@dataclasses.dataclass(frozen=True)
class Attention:
    """The weights of an attention layer as matrices (out, in), each a view of a parameter.

    Attributes:
        name: Name of the layer.
        queries: (heads k, d).
        keys: (heads k, d), of fewer heads where several queries share them.
        values: Likewise.
        output: (d, heads k).
        heads: Number of heads.
    """

    name: str
    queries: Tensor
    keys: Tensor
    values: Tensor
    output: Tensor
    heads: int

    @property
    def head_size(self) -> int:
        """K."""
        return self.queries.shape[0] // self.heads


def attention_layers(model: nn.Module, tensors: ModelTensors) -> list[Attention]:
    """The attention layers whose weights are scaled, in the order of the model.

    Known are layers with a linear layer for each projection, or one for queries, keys and values (timm, GPT-2).

    Raises:
        ModelError: A model without one.
    """
    scaled = {id(parameter) for parameter in tensors.scaled_parameters}
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        projections = _projections(module)
        output = _output(module, modules.get(name.rpartition(".")[0]))
        if projections is None or output is None:
            continue
        weights = [layer.weight for layer in dict.fromkeys((*projections, output))]
        if not all(id(weight) in scaled for weight in weights):
            continue
        matrices = [_matrix(layer) for layer in projections]
        queries, keys, values = matrices[0].chunk(3) if len(matrices) == 1 else matrices
        heads: Any = next((getattr(module, key) for key in _HEADS if hasattr(module, key)), None)
        heads = heads or queries.shape[0] // cast(Any, module).head_dim
        found.append(Attention(name, queries, keys, values, _matrix(output), int(heads)))
    if not found:
        fix = "Choose a Transformer with linear layers for queries, keys, values and output"
        raise ModelError(Problem(type(model).__name__, "no attention layer that is known", fix))
    return found


def holds_all_projections(name: str) -> bool:
    """Whether a parameter of this name holds queries, keys and values together."""
    return any(part in _FUSED for part in name.split("."))


def uniform(like: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    """Entries from U(-bound, bound), of the shape, type and device of another tensor."""
    drawn = torch.rand(like.shape, generator=generator, dtype=torch.float64) * 2 - 1
    return (bound * drawn).to(like)


def _projections(module: nn.Module) -> list[nn.Module] | None:
    children = dict(module.named_children())
    for names in (*_SEPARATE, *((name,) for name in _FUSED)):
        if all(_is_linear(children.get(name)) for name in names):
            return [children[name] for name in names]
    return None


def _output(module: nn.Module, parent: nn.Module | None) -> nn.Module | None:
    children = dict(module.named_children())
    beside = None if parent is None else dict(parent.named_modules()).get("output.dense")
    candidates = [*(children.get(name) for name in _OUTPUTS), beside]
    return next((layer for layer in candidates if _is_linear(layer)), None)


def _is_linear(layer: nn.Module | None) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2


def _matrix(layer: nn.Module) -> Tensor:
    """The weight as (out, in); GPT-2's Conv1D keeps it the other way round."""
    weight: Tensor = layer.weight.data  # type: ignore[assignment]
    return weight if isinstance(layer, nn.Linear) else weight.T
