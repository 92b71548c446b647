"""Two values of a behaviour are held against each other."""

import math

import numpy as np
import torch


def differences(expected, found, alike=False, where="value"):
    """The places at which two values differ, `expected` of Trainer and `found` of NIOTrainer.

    Where they need only be alike, real numbers are compared by being finite, tensors by shape and dtype, too.
    """
    if type(expected) is not type(found):
        yield f"{where}: {_short(expected)} in Trainer, {_short(found)} here"
    elif isinstance(expected, dict):
        yield from _keys(expected, found, where)
        for key in expected.keys() & found.keys():
            yield from differences(expected[key], found[key], alike, f"{where}[{key!r}]")
    elif isinstance(expected, frozenset):
        yield from _keys(dict.fromkeys(expected), dict.fromkeys(found), where)
    elif isinstance(expected, list | tuple):
        if len(expected) != len(found):
            yield f"{where}: {len(expected)} items in Trainer, {len(found)} here: {_short(expected)}, {_short(found)}"
        for index, (left, right) in enumerate(zip(expected, found, strict=False)):
            yield from differences(left, right, alike, f"{where}[{index}]")
    elif isinstance(expected, np.ndarray):
        yield from differences(torch.from_numpy(expected), torch.from_numpy(found), alike, where)
    elif isinstance(expected, torch.Tensor):
        yield from _tensors(expected, found, alike, where)
    elif isinstance(expected, float):
        if math.isfinite(expected) != math.isfinite(found) or (not alike and not _equal(expected, found)):
            yield f"{where}: {expected} in Trainer, {found} here"
    elif expected != found:
        yield f"{where}: {_short(expected)} in Trainer, {_short(found)} here"


def _keys(expected, found, where):
    for only, side in ((expected.keys() - found.keys(), "in Trainer"), (found.keys() - expected.keys(), "here")):
        if only:
            yield f"{where}: {sorted(only)} {side} only"


def _tensors(expected, found, alike, where):
    if expected.shape != found.shape or expected.dtype != found.dtype:
        yield f"{where}: {expected.shape}, {expected.dtype} in Trainer, {found.shape}, {found.dtype} here"
    elif not expected.is_floating_point():
        if not alike and not torch.equal(expected, found):
            yield f"{where}: other whole numbers"
    elif not torch.equal(expected.isfinite(), found.isfinite()):
        yield f"{where}: finite at other places"
    elif not alike and not torch.equal(expected.nan_to_num(), found.nan_to_num()):
        yield f"{where}: differs by up to {(expected.double() - found.double()).abs().max():.3g}"


def _equal(left, right):
    return left == right or (math.isnan(left) and math.isnan(right))


def _short(value):
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
