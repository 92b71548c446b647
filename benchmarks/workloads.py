"""What is measured: models and batches, a training step, and one NIO iteration by each path and by the joint graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForImageClassification, set_seed

from nio_hf.core import Collective, LayerScales
from nio_hf.core.batches import take
from nio_hf.core.config import CurvatureName
from nio_hf.core.curvature import Exact, make_path
from nio_hf.core.differentiator import Differentiator
from nio_hf.core.gradcosine import sub_batch_windows
from nio_hf.core.mode import measuring
from nio_hf.core.objectives import CosineObjective
from nio_hf.core.reference import Reference, joint_graph
from nio_hf.core.sample_wise import sample_wise_sums
from nio_hf.core.two_pass import Reading, TwoPass

JOINT = "joint"
_ALL_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PATHS: dict[str, tuple[CurvatureName, bool]] = {
    "exact": ("exact", False),
    "exact_kept": ("exact_kept", False),
    "exact_micro": ("exact", True),
    "finite_difference": ("finite_difference", False),
    "finite_difference_kept": ("finite_difference_kept", False),
}
"""{name: (curvature, whether in micro-batches of half a sub-batch)}."""

_MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "vit-small-224": (
        224,
        {"model_type": "vit", "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    ),
    "swin-tiny-224": (224, {"model_type": "swin"}),
    "vit-tiny-32": (
        32,
        {
            "model_type": "vit",
            "image_size": 32,
            "patch_size": 4,
            "hidden_size": 192,
            "num_attention_heads": 3,
            "intermediate_size": 768,
        },
    ),
}
MODELS = tuple(_MODELS)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model with a batch size and a split.

    Attributes:
        name: one of `MODELS`.
        model: on the device that is measured.
        batch_size: B.
        sub_batches: D.
        overlap: r.
        scales: of the model; finding them reads values, which tensors without data do not have.
    """

    name: str
    model: nn.Module
    scales: LayerScales
    batch_size: int
    sub_batches: int = 2
    overlap: float = 0.0

    @property
    def parameter_bytes(self) -> int:
        """P in bytes."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

    def batch(self) -> dict[str, Tensor]:
        """Random images."""
        size = _MODELS[self.name][0]
        device = next(self.model.parameters()).device
        pixels = torch.randn(self.batch_size, 3, size, size, device=device)
        return {"pixel_values": pixels, "labels": torch.arange(self.batch_size, device=device) % 1000}

    def training_step(self, math_attention: bool, samples: int | None = None) -> Callable[[], None]:
        """Forward and backward of a batch, or of some samples of it; the optimizer is left out of either side."""

        def step() -> None:
            batch = take(self.batch(), range(samples or self.batch_size))
            with sdpa_kernel([SDPBackend.MATH] if math_attention else _ALL_KERNELS):
                torch.autograd.grad(mean_loss(self.model, batch), list(self.model.parameters()), allow_unused=True)

        return step

    def iteration(self, path: str, host_read: bool) -> Callable[[], Tensor]:
        """One iteration: both passes, and what the host reads of them; returns dJ/domega."""
        if path == JOINT:
            return lambda: self._joint().scale_gradient
        curvature, in_parts = PATHS[path]
        samples = -(-self.batch_size // self.sub_batches)
        return lambda: self._two_passes(curvature, -(-samples // 2) if in_parts else None, host_read)

    def double_graph(self, samples: int) -> Callable[[], None]:
        """Gradient with a graph of some samples, and a product through it: the unit of memory of the exact paths."""

        def work() -> None:
            scales = self.scales
            differentiator = Differentiator(self.model, mean_loss, scales)
            batch = take(self.batch(), range(samples))
            with measuring(self.model):
                path = Exact(differentiator)
                path.second(0, batch, lambda gradient: [torch.ones_like(part) for part in gradient])

        return work

    def sample_wise(self, at_once: bool) -> Callable[[], None]:
        """GradCosine of D = B, vectorised or in a loop."""

        def work() -> None:
            scales = self.scales
            differentiator = Differentiator(self.model, mean_loss, scales)
            passes = TwoPass(self.model, differentiator, scales, Collective(), "batch")
            batch = self.batch()
            with measuring(self.model):
                if at_once:
                    sample_wise_sums(self.model, differentiator, batch)
                else:
                    passes.first_pass(Exact(differentiator), passes.split(batch, self.batch_size), "")

        return work

    def scale_gradient(self, path: str, precision: torch.dtype | None = None) -> Tensor:
        """The scale gradient of one fixed batch, for errors of one path against another."""
        set_seed(0)
        curvature, _ = PATHS[path]
        return self._two_passes(curvature, None, False, precision)

    def _two_passes(
        self, curvature: CurvatureName, micro: int | None, host_read: bool, precision: torch.dtype | None = None
    ) -> Tensor:
        scales = self.scales
        differentiator = Differentiator(self.model, mean_loss, scales, micro, precision)
        passes = TwoPass(self.model, differentiator, scales, Collective(), "batch")
        initial = [parameter.detach() for parameter in scales.scaled]
        with measuring(self.model):
            parts = passes.split(self.batch(), self.sub_batches, overlap=self.overlap)
            path = make_path(curvature, differentiator, parts.owned[0], self.sub_batches)
            sums = passes.first_pass(path, parts, "")
            if host_read:
                Reading.of(sums)
            return passes.second_pass(path, parts, sums, CosineObjective(), initial, "")

    def _joint(self) -> Reference:
        scales = self.scales
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        batch = self.batch()
        windows = sub_batch_windows(self.batch_size, self.sub_batches, self.overlap)
        with measuring(self.model):
            return joint_graph(
                self.model,
                lambda model: _losses_of_one_forward(model, batch, windows),
                gradient=[names[id(parameter)] for parameter in scales.gradient],
                scaled=[names[id(parameter)] for parameter in scales.scaled],
            )


def workload(
    name: str, device: torch.device, *, batch_size: int, sub_batches: int = 2, overlap: float = 0.0
) -> Workload:
    """A model of `MODELS` with fixed initial weights, in evaluation mode: no dropout on either side.

    On the device "meta" its tensors have shapes and no data: operations and bytes can be counted at any size.
    """
    set_seed(0)
    config = AutoConfig.for_model(**_MODELS[name][1], num_labels=1000)
    model: nn.Module = AutoModelForImageClassification.from_config(config, dtype=torch.float32).eval()
    if device.type != "meta":
        model.to(device)
    scales = LayerScales(model)
    if device.type == "meta":
        for tensor in (*model.parameters(), *model.buffers()):
            empty = torch.empty_like(tensor, device="meta")
            torch.utils.swap_tensors(tensor, nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty)
    return Workload(name, model, scales, batch_size, sub_batches, overlap)


def _losses_of_one_forward(model: nn.Module, batch: dict[str, Tensor], windows: list[list[int]]) -> list[Tensor]:
    """The losses of the sub-batches from one forward of the whole batch, as the published code takes them."""
    logits = model(pixel_values=batch["pixel_values"]).logits
    return [nn.functional.cross_entropy(logits[window], batch["labels"][window]) for window in windows]


def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of a batch."""
    return nn.functional.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])
