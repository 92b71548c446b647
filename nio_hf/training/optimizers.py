"""Optimizers that `TrainingArguments.optim` has no word for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nio_hf.core.groups import kinds_of
from nio_hf.errors import ModelError, Problem
from nio_hf.recipe.settings import OptimizerName
from nio_hf.trainer import NIOTrainingArguments
from nio_hf.training.muon import MuonAndAdamW


def optimizer_options(
    name: OptimizerName | None, args: NIOTrainingArguments, model: nn.Module
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """The class of an optimizer and its arguments, as Trainer takes them; None for what `optim` says.

    Args:
        name: "radam" for RAdam with decoupled weight decay (Liu et al., ICLR 2020), whose first steps are smaller by a
            factor that depends on beta2 alone: an implicit warmup of the order of 2 / (1 - beta2) steps (Ma and
            Yarats, AAAI 2021). "muon" for [`MuonAndAdamW`].
        args: give learning rate, betas and epsilon.
        model: whose matrices Muon is for.

    Raises:
        ModelError: for Muon and a model without matrices between its first and its last layers.
    """
    if name is None:
        return None
    options = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if name == "radam":
        return torch.optim.RAdam, {**options, "decoupled_weight_decay": True}
    kinds = kinds_of(model)
    matrices = [weight for key, weight in model.named_parameters() if kinds[key] == "trunk" and weight.ndim == 2]
    if not matrices:
        fix = "Choose a Transformer, or another optimizer"
        raise ModelError(Problem("optimizer", f"muon, and {type(model).__name__} has no matrices in its blocks", fix))
    return MuonAndAdamW, {**options, "matrices": matrices}
