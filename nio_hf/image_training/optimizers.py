"""Optimizers that `TrainingArguments.optim` has no word for."""

from __future__ import annotations

from typing import Any

import torch

from nio_hf.recipe.settings import OptimizerName
from nio_hf.trainer import NIOTrainingArguments


def optimizer_options(
    name: OptimizerName | None, args: NIOTrainingArguments
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """The class of an optimizer and its arguments, as Trainer takes them; None for what `optim` says.

    Args:
        name: "radam" for RAdam with decoupled weight decay (Liu et al., ICLR 2020), whose first steps are smaller by a
            factor that depends on beta2 alone: an implicit warmup of the order of 2 / (1 - beta2) steps (Ma and
            Yarats, AAAI 2021).
        args: give learning rate, betas and epsilon.
    """
    if name is None:
        return None
    options = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "decoupled_weight_decay": True,
    }
    return torch.optim.RAdam, options
