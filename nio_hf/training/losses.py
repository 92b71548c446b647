"""Whether a model's own loss honours `num_items_in_batch`."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def ignores_num_items(model: nn.Module) -> bool:
    """Whether a transformers model takes loss arguments in `forward` without passing them to its loss.

    Trainer hands such a model (Swinv2, ResNet, BEiT, ConvNeXt, ...) `num_items_in_batch` and takes its loss for
    normalised, although it is a mean: loss and gradient then grow with accumulation steps and processes. `forward` is
    read, since a model says nowhere which it does.
    """
    owner: Any = next(base for base in type(model).__mro__ if "forward" in vars(base))
    if not isinstance(model, PreTrainedModel) or not owner.__module__.startswith("transformers."):
        return False
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(owner.forward)))
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    loss_calls = [call for call in calls if "loss" in ast.unparse(call.func).lower()]
    passed_on = [keyword.arg in (None, "num_items_in_batch") for call in loss_calls for keyword in call.keywords]
    return bool(loss_calls) and not any(passed_on)
