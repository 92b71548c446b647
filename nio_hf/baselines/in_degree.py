"""How many values are summed where the output of a weight goes, read off the graph of a loss.

A sum of activations is a vertex of the network's graph, and the number of its summands is the in-degree of the layers
whose outputs are summed: 2 for the last layer of a residual branch, 1 for a layer whose output goes on alone.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

Node = Any
"""A node of autograd's graph."""

_LEAF, _SUM = "AccumulateGrad", "Add"
_PRODUCTS = ("Addmm", "Bmm", "Convolution", "Embedding", "Linear", "Mm")
_REARRANGING = ("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Expand", "Unsqueeze", "Squeeze")
_TAKING = ("Split", "SplitWithSizes", "Chunk", "Unbind", "Select", "Slice", "ToCopy", "Clone")


def in_degrees(loss: Tensor, weights: Sequence[nn.Parameter]) -> list[int]:
    """The in-degree of each weight; the larger one where it is used several times.

    The output of a weight is followed through whatever works on it alone (biases, normalisation, layer scales,
    activations) up to a sum. A summand that is used elsewhere too is the skip connection, and nobody's output. One that
    needs no gradient, because all in front of it is frozen, cannot be seen.

    Args:
        loss: Loss with its graph.
        weights: Weights of linear and convolution layers.
    """
    nodes, known = _from_leaves(loss.grad_fn), {id(weight) for weight in weights}
    users = collections.Counter(child for node in nodes for child in _children(node))
    parameters: dict[Node, int] = {}
    activations: set[Node] = set()
    sources: dict[Node, list[int]] = {}
    sums: dict[Node, list[Node]] = {}
    for node in nodes:
        children, operation = _children(node), str(node.name()).split("Backward")[0]
        if operation.endswith(_LEAF):
            parameters[node] = id(node.variable)
            continue
        if len(children) == 1 and children[0] in parameters and operation in (*_REARRANGING, *_TAKING):
            parameters[node] = parameters[children[0]]
            continue
        if operation in _PRODUCTS or any(child in activations for child in children):
            activations.add(node)
        # The weights of the layer that this value comes from, if nothing else uses it on the way.
        sources[node] = [parameters[child] for child in children if parameters.get(child) in known]
        inputs = [child for child in children if child not in parameters]
        if not sources[node] and len(inputs) == 1 and users[inputs[0]] == 1:
            sources[node] = sources[inputs[0]]
        if operation == _SUM and len(children) == 2 and all(child in activations for child in children):
            # A sum that nothing but another one uses is a part of it.
            parts = [sums.pop(child) if child in sums and users[child] == 1 else [child] for child in children]
            sums[node] = parts[0] + parts[1]
    degrees = dict.fromkeys(known, 1)
    for summands in sums.values():
        for weight in (weight for node in summands if users[node] == 1 for weight in sources[node]):
            degrees[weight] = max(degrees[weight], len(summands))
    return [degrees[id(weight)] for weight in weights]


def _children(node: Node) -> list[Node]:
    return [child for child, _ in node.next_functions if child is not None]


def _from_leaves(root: Node) -> list[Node]:
    """All nodes below a root, each after its children."""
    order: list[Node] = []
    entered: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root, False)]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in entered:
            entered.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child in _children(node))
    return order
