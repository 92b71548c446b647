"""Muon for the matrices of the trunk, AdamW for all other parameters, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for some matrices and its AdamW for the other parameters.

    The update of Muon is scaled by 0.2 sqrt(max(out, in)), so that both work with the learning rate and the weight
    decay of AdamW (Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982).

    Args:
        params: groups of parameters with their weight decay, as Trainer makes them.
        matrices: the parameters of two dimensions that Muon is for.
        lr: learning rate.
        betas: of AdamW.
        eps: of AdamW.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        matrices: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        chosen = {id(parameter) for parameter in matrices}
        groups = list(params)
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(_groups(groups, chosen, own=True), lr=lr, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(_groups(groups, chosen, own=False), lr=lr, betas=betas, eps=eps),
        ]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the groups be those of the parts: schedules write the learning rate into them."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with both."""
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the states of both."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share()


def _groups(groups: Iterable[dict[str, Any]], chosen: set[int], *, own: bool) -> list[dict[str, Any]]:
    """The groups with the parameters of one part; a group without any is left out."""
    parts = [
        {**group, "params": [parameter for parameter in group["params"] if (id(parameter) in chosen) is own]}
        for group in groups
    ]
    return [group for group in parts if group["params"]]
