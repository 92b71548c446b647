"""Batches of any structure: their size, parts of them, and where they are."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nio_hf.errors import DataError, Problem

_MAX_NAMED = 6
_IGNORED, _IGNORED_PIXEL = -100, 255


def batch_size(batch: Any) -> int:
    """Number of samples of a batch: the common length of its tensors along dimension 0.

    A list inside a mapping counts as one entry per sample, whatever its entries are.

    Raises:
        DataError: Where no tensor has a dimension 0, or the lengths differ.
    """
    lengths = {path: leaf.shape[0] for path, leaf in _leaves(batch, "batch") if isinstance(leaf, Tensor) and leaf.ndim}
    if not lengths:
        found = f"no tensor with a sample dimension in a {type(batch).__name__}"
        raise DataError(Problem("batch", found, "Give a mapping, tuple or tensor with samples along dimension 0"))
    if len(set(lengths.values())) > 1:
        named = [f"{path} {length}" for path, length in lengths.items()]
        found = "tensors of different length: " + ", ".join(named[:_MAX_NAMED]) + (", ..." * (len(named) > _MAX_NAMED))
        raise DataError(Problem("batch", found, "Give every tensor of a batch one entry per sample along dimension 0"))
    return next(iter(lengths.values()))


def take(batch: Any, indices: Sequence[int] | Tensor) -> Any:
    """The samples of a batch at some positions, in that order; what is not per sample stays as it is."""
    index = torch.as_tensor(indices)
    size = batch_size(batch)

    def select(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.index_select(0, index.to(leaf.device))
        if isinstance(leaf, list) and len(leaf) == size:
            return [leaf[position] for position in index.tolist()]
        return leaf

    return _map(select, batch)


def chunks(batch: Any, size: int | None) -> Iterator[Any]:
    """Consecutive parts of at most `size` samples; the batch itself where that is all of it."""
    total = batch_size(batch)
    if size is None or size >= total:
        yield batch
        return
    for start in range(0, total, size):
        yield take(batch, range(start, min(start + size, total)))


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """The batch with its tensors replaced, whatever they are nested in."""

    def replaced(leaf: Any) -> Any:
        if isinstance(leaf, list):
            return [map_tensors(function, item) for item in leaf]
        return function(leaf) if isinstance(leaf, Tensor) else leaf

    return _map(replaced, batch)


def copied(batch: Mapping[Any, Any]) -> MutableMapping[Any, Any]:
    """A copy that may be written to, of the same type where that makes copies whose entries are its own."""
    if isinstance(batch, dict) or (isinstance(batch, MutableMapping) and hasattr(batch, "__copy__")):
        return copy.copy(batch)
    return dict(batch)


def too_many_sub_batches(sub_batches: int, size: int) -> Problem:
    """The problem of D sub-batches for a batch of B samples."""
    fix = f"Choose 2 to {size} sub-batches, or a larger batch" if size > 2 else "Give batches of at least 2 samples"
    return Problem("NIOConfig.sub_batches", f"{sub_batches} for a batch of {size} samples", fix)


def tensors_equal(left: Any, right: Any) -> bool:
    """Whether two batches hold the same tensors in the same places."""
    pairs = itertools.zip_longest(_leaves(left, ""), _leaves(right, ""), fillvalue=("", None))
    return all(_leaf_equal(a, b) for (_, a), (_, b) in pairs)


def _leaf_equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.equal(left, right)
    return not isinstance(left, Tensor) and not isinstance(right, Tensor)


def _map(function: Callable[[Any], Any], batch: Any) -> Any:
    """The batch with its leaves replaced; mappings, see [`copied`], and tuples keep their type."""
    if isinstance(batch, Mapping):
        mapped = copied(batch)
        for key, value in batch.items():
            mapped[key] = function(value) if isinstance(value, list) else _map(function, value)
        return mapped
    if isinstance(batch, tuple | list):
        values = [_map(function, value) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return function(batch)


def _leaves(batch: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from [(path, value)] if isinstance(value, list) else _leaves(value, f"{path}[{key!r}]")
    elif isinstance(batch, tuple | list):
        for position, value in enumerate(batch):
            yield from _leaves(value, f"{path}[{position}]")
    else:
        yield path, batch


def all_ignored_labels(batch: Any) -> bool:
    """Whether a batch has labels, and every one of them is a value that losses ignore: -100, or 255 in segmentation."""
    labels = _labels(batch)
    return bool(labels) and all(bool(((leaf == _IGNORED) | (leaf == _IGNORED_PIXEL)).all()) for leaf in labels)


def _labels(batch: Any) -> list[Tensor]:
    """The integer tensors of a batch whose name contains "label" or "target", in a tuple its last tensor."""
    leaves = [(path, leaf) for path, leaf in _leaves(batch, "") if isinstance(leaf, Tensor) and leaf.ndim]
    named = [leaf for path, leaf in leaves if "label" in path.lower() or "target" in path.lower()]
    if not named and isinstance(batch, tuple | list) and leaves:
        named = [leaves[-1][1]]
    return [leaf for leaf in named if not leaf.is_floating_point() and leaf.dtype != torch.bool and leaf.numel()]


SAME_BATCHES = (
    "Give all processes the same batches: a loader in a fixed order that neither accelerate.prepare nor a distributed "
    "sampler has split"
)
"""How to make processes agree on batches that differ."""


def content_of(batch: Any) -> list[tuple[str, float, float]]:
    """A signature of a batch: the place of each tensor, its sum, and its sum weighted by position."""
    found = []
    for path, leaf in _leaves(batch, "batch"):
        if isinstance(leaf, Tensor):
            values = leaf.detach().double().flatten()
            weights = torch.arange(1, len(values) + 1, dtype=values.dtype, device=values.device)
            found.append((path, float(values.sum()), float((values * weights).sum())))
    return found
