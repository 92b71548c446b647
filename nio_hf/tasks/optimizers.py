"""Optimisers that `TrainingArguments.optim` lacks, and the parameters with weight decay."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from nio_hf.core.groups import kinds_of
from nio_hf.errors import ModelError, Problem
from nio_hf.recipe.settings import OptimizerName
from nio_hf.trainer import NIOTrainingArguments

VECTORS = "vectors"
Groups = list[dict[str, Any]]


def optimizer_options(
    name: OptimizerName | None, args: NIOTrainingArguments, model: nn.Module
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """Return the class of an optimiser and its arguments, as Trainer takes them; None for the optimiser of `optim`.

    Args:
        name: Name "radam" for RAdam with decoupled weight decay (Liu et al., ICLR 2020), whose first steps are smaller
            by a factor that depends on beta2 alone: an implicit warmup of the order of 2 / (1 - beta2) steps (Ma and
            Yarats, AAAI 2021); or "muon" for [`MuonAndAdamW`].
        args: Training arguments, with learning rate, betas and epsilon.
        model: Model whose matrices Muon updates.

    Raises:
        ModelError: Model without matrices between its first and its last layers, for Muon.
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


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for some matrices and its AdamW for the other parameters.

    The update of Muon is scaled by 0.2 sqrt(max(out, in)), so that both work with the learning rate and the weight
    decay of AdamW (Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982).

    Args:
        params: Groups of parameters with their weight decay, as Trainer makes them.
        matrices: Parameters of two dimensions that Muon updates.
        lr: Learning rate.
        **options: Options `betas` and `eps` of AdamW.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], *, matrices: Iterable[nn.Parameter], lr: float, **options: Any
    ):
        chosen = {id(parameter) for parameter in matrices}
        muon: Groups = []
        others: Groups = []
        for group in params:
            for part, is_muon in ((muon, True), (others, False)):
                own = [parameter for parameter in group["params"] if (id(parameter) in chosen) is is_muon]
                part += [{**group, "params": own}] * bool(own)
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(muon, lr=lr, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, **options),
        ]
        super().__init__(self._all_groups(), {})
        self.param_groups = self._all_groups()

    def _all_groups(self) -> Groups:
        """Groups of both optimisers, into which schedules write the learning rate."""
        return [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with both optimisers."""
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """States of both optimisers."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the states of both optimisers."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._all_groups()


def decayed_parameters(model: nn.Module, without: Sequence[str]) -> list[str]:
    """Names of the parameters with weight decay, as the published trainings choose them.

    Args:
        model: Model of the parameters.
        without: Parameters without weight decay: "vectors" for all of fewer than two dimensions (biases, normalisation,
            layer scale), others by the last part of their name, e.g. "cls_token" or "relative_position_bias_table".

    Raises:
        ModelError: Name that no parameter has.
    """
    last_parts = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    problems = []
    for name in without:
        if name != VECTORS and name not in last_parts:
            near = difflib.get_close_matches(name, last_parts, n=1)
            names = f"Choose {VECTORS} or one of {', '.join(sorted(last_parts))}"
            fix = f"Did you mean {near[0]!r}?" if near else names
            problems.append(Problem("no_weight_decay", f"{type(model).__name__} has no parameter {name!r}", fix))
    if problems:
        raise ModelError(*problems)
    return [
        name
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] not in without and not (VECTORS in without and parameter.ndim < 2)
    ]
