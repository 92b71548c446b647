"""Diagnostics of the first training steps: how far each weight matrix turns, and how far the output moves.

Letters: W a weight matrix before a step and W' after it, f the output of the model for a fixed batch.

    relative update     ||W' - W|| / ||W||
    angular update      arccos(<W, W'> / (||W|| ||W'||)), in radians; computed from ||W' - W||, which keeps small angles
    output change       ||f' - f|| / ||f||

Source: Kosson, Messmer and Jaggi, "Analyzing & Reducing the Need for Learning Rate Warmup in GPT Training", NeurIPS
2024, arXiv 2410.23922.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from nio_hf.core import mode

FIRST_STEPS = 50
"""Number of training steps that are measured."""


class StepDiagnostics(TrainerCallback):
    """Measures the first steps of a training, with one forward pass of a fixed batch in each.

    Attributes:
        values: {quantity: one value for each step}: the mean over the weight matrices that are not zero at the start,
            or the change of the output.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        self._model = model
        self._inputs = inputs
        self._matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2 and parameter.any()]
        self._weights: list[Tensor] = []
        self._output = torch.zeros(0)
        self.values: dict[str, list[float]] = {"relative_update": [], "angular_update": [], "output_change": []}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the state before the first step."""
        self._note()

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the step."""
        if state.global_step > FIRST_STEPS:
            self._weights = []
            return
        former, output = self._weights, self._output
        self._note()
        before, after = (torch.stack(torch._foreach_norm(weights)).double() for weights in (former, self._weights))
        moved = torch.stack(torch._foreach_norm(torch._foreach_sub(self._weights, former))).double()
        # The arccosine of a product of norms would lose small angles to rounding.
        chord = ((moved**2 - (after - before) ** 2).clamp(min=0) / (before * after)).sqrt()
        self.values["relative_update"].append(float((moved / before).mean()))
        self.values["angular_update"].append(float((2 * (chord / 2).clamp(max=1).arcsin()).mean()))
        self.values["output_change"].append(float((self._output - output).norm() / output.norm()))

    @torch.no_grad()
    def _note(self) -> None:
        self._weights = [matrix.detach().clone() for matrix in self._matrices]
        with mode.measuring(self._model), torch.no_grad():
            device = self._matrices[0].device
            self._output = self._model(**{key: value.to(device) for key, value in self._inputs.items()}).logits.float()
