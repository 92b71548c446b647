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
        loss: with its graph.
        weights: of linear and convolution layers.
    """
    graph = _Graph(loss, weights)
    found = {id(weight): 1 for weight in weights}
    for node in graph.nodes:
        if graph.is_sum(node) and not graph.is_part_of_sum(node):
            summands = graph.summands(node)
            for summand in summands:
                for weight in graph.weights_behind(summand):
                    found[weight] = max(found[weight], len(summands))
    return [found[id(weight)] for weight in weights]


class _Graph:
    """The graph of a loss, seen from its operations.

    Args:
        loss: the root.
        weights: the leaves that make an operation a layer.

    Attributes:
        nodes: from the leaves to the loss.
    """

    def __init__(self, loss: Tensor, weights: Sequence[nn.Parameter]) -> None:
        self._weights = {id(weight) for weight in weights}
        self.nodes = _from_leaves(loss.grad_fn)
        self._users: dict[Node, list[Node]] = collections.defaultdict(list)
        self._leaf: dict[Node, int] = {}
        self._activations: set[Node] = set()
        for node in self.nodes:
            for child in _children(node):
                self._users[child].append(node)
            self._place(node)

    def _place(self, node: Node) -> None:
        """Note whether a node is a parameter, perhaps rearranged, or the value of a layer, perhaps worked on."""
        children = _children(node)
        if node.name().endswith(_LEAF):
            self._leaf[node] = id(node.variable)
        elif len(children) == 1 and children[0] in self._leaf and _operation(node) in (*_REARRANGING, *_TAKING):
            self._leaf[node] = self._leaf[children[0]]
        elif _operation(node) in _PRODUCTS or any(child in self._activations for child in children):
            self._activations.add(node)

    def _own(self, node: Node) -> list[int]:
        """The weights that an operation takes directly."""
        return [self._leaf[child] for child in _children(node) if self._leaf.get(child) in self._weights]

    def is_sum(self, node: Node) -> bool:
        """Whether a node adds two activations."""
        children = _children(node)
        return _operation(node) == _SUM and len(children) == 2 and all(child in self._activations for child in children)

    def is_part_of_sum(self, node: Node) -> bool:
        """Whether a sum is only the first part of another one."""
        users = self._users[node]
        return self.is_sum(node) and len(users) == 1 and self.is_sum(users[0])

    def summands(self, node: Node) -> list[Node]:
        """What a sum adds, the summands of sums that are a part of it included."""
        found = []
        for child in _children(node):
            found += self.summands(child) if self.is_part_of_sum(child) else [child]
        return found

    def weights_behind(self, node: Node) -> list[int]:
        """The weights of the layer that a value comes from, if nothing else uses it on the way."""
        while len(self._users[node]) == 1:
            own = self._own(node)
            inputs = [child for child in _children(node) if child not in self._leaf]
            if own or len(inputs) != 1:
                return own
            node = inputs[0]
        return []


def _children(node: Node) -> list[Node]:
    return [child for child, _ in node.next_functions if child is not None]


def _operation(node: Node) -> str:
    return str(node.name()).split("Backward")[0]


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
