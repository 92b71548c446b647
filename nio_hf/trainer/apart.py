"""A Trainer whose loss NIO can compute without leaving a trace in the training."""

from __future__ import annotations

import collections
import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState

from nio_hf.core.memory import is_out_of_memory
from nio_hf.durable.isolation import isolated_random_state
from nio_hf.errors import NIOMemoryError, Problem
from nio_hf.trainer.naming import named_as_arguments

if TYPE_CHECKING:
    from nio_hf.trainer.trainer import NIOTrainerMixin

T = TypeVar("T")

_CONTAINERS = (dict, list, set, collections.deque)
_DATA = ("train_dataset", "eval_dataset")


def copy_apart(trainer: Trainer) -> Trainer:
    """A copy of a Trainer that shares its model, data and settings, and has counts, lists and logs of its own.

    `compute_loss` of a subclass may count tokens, collect metrics or log, and so may a `compute_loss_func` that is an
    object. Called on the copy, it does so there.
    """
    apart = copy.copy(trainer)
    for name, value in vars(trainer).items():
        if name not in _DATA:
            setattr(apart, name, _copied(value, {}))
    function = trainer.compute_loss_func
    if function is not None and not isinstance(function, nn.Module) and not inspect.isroutine(function):
        apart.compute_loss_func = copy.copy(function)
    apart.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return apart


@contextlib.contextmanager
def computing_apart(trainer: NIOTrainerMixin) -> Iterator[None]:
    """Keep traces of NIO out of random numbers, counts and logs, and let its errors name arguments.

    The loss is that of a copy of the Trainer, `trainer._apart`.

    Raises:
        NIOError: In the words of the arguments.
        NIOMemoryError: An out-of-memory of NIO, which must not shrink the training batch
            (`auto_find_batch_size`).
    """
    with isolated_random_state(trainer.args.device, trainer.train_dataset), named_as_arguments():
        try:
            trainer._apart = copy_apart(trainer)
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fix = "Set nio_micro_batch_size, or lower nio_batch_size"
            raise NIOMemoryError(Problem("NIO", f"out of memory ({error})", fix)) from error
        finally:
            trainer._apart = None


def _copied(value: T, copies: dict[int, Any]) -> T:
    """A value with its containers copied, and what they hold as it is."""
    if isinstance(value, TrainerState | TrainerControl):
        return copy.copy(value)
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        return cast(T, value.clone())
    if not isinstance(value, _CONTAINERS):
        return value
    if id(value) in copies:
        found: T = copies[id(value)]
        return found
    copied: Any = copy.copy(value)
    copies[id(value)] = copied
    if isinstance(copied, dict):
        for key, entry in copied.items():
            copied[key] = _copied(entry, copies)
    elif not isinstance(copied, set):
        for position, entry in enumerate(copied):
            copied[position] = _copied(entry, copies)
    result: T = copied
    return result
