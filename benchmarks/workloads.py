"""What is measured: models and batches, a training step, and one batch of NIO by each way and by the joint graph."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForImageClassification, set_seed

from benchmarks.reference import Reference, joint_graph
from nio_hf.core import Collective, InitResult, NIOConfig, find_tensors, initialize
from nio_hf.core.batches import take
from nio_hf.core.curvature import Path, exact_product, second_pass
from nio_hf.core.gradcosine import published_windows, sub_batch_windows
from nio_hf.core.loss import Loss
from nio_hf.core.mode import measuring
from nio_hf.core.objectives import CosineObjective
from nio_hf.core.sub_batches import SubBatches, first_pass, read, split
from nio_hf.core.tensors import ModelTensors
from nio_hf.recipe.strict_yaml import read_settings

JOINT, FIRST_PASS = "joint", "first_pass"
_ALL_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PATHS: dict[str, tuple[Path, bool]] = {
    "exact": (Path("exact"), False),
    "exact_kept": (Path("exact", "graphs"), False),
    "exact_micro": (Path("exact"), True),
    "finite_difference": (Path("finite_difference"), False),
    "finite_difference_kept": (Path("finite_difference", "gradients"), False),
}
"""{name: (path of both passes, whether in micro-batches of half a sub-batch)}."""
WAYS = (FIRST_PASS, *PATHS, JOINT)
"""Everything that a batch of NIO is computed by."""

_MODELS: dict[str, dict[str, Any]] = {
    "vit-small-224": {"model_type": "vit", "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "swin-tiny-224": {"model_type": "swin"},
    "vit-tiny-32": {
        "model_type": "vit",
        "image_size": 32,
        "patch_size": 4,
        "hidden_size": 192,
        "num_attention_heads": 3,
        "intermediate_size": 768,
    },
}
MODELS = tuple(_MODELS)
STUDY_MODELS = ("vit", "swin")
"""The models of `benchmarks/warmup_free`, of which a whole run is counted."""
_CLASSES, _STUDY_CLASSES = 1000, 10


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model with a batch size and a split.

    Attributes:
        model: on the device that is measured.
        tensors: of the model; finding them reads values, which tensors without data do not have.
        batch_size: B.
        sub_batches: D.
        overlap: r of the published windows; 0 for the partition of all other searches.
        collective: the processes that share the sub-batches.
    """

    model: nn.Module
    tensors: ModelTensors
    batch_size: int
    sub_batches: int = 2
    overlap: float = 0.0
    collective: Collective = dataclasses.field(default_factory=Collective)

    @property
    def parameter_bytes(self) -> int:
        """P in bytes."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

    @property
    def windows(self) -> list[list[int]]:
        """Positions of the samples of each sub-batch."""
        if self.overlap:
            return published_windows(self.batch_size, self.sub_batches, self.overlap)
        return sub_batch_windows(self.batch_size, self.sub_batches)

    def batch(self) -> dict[str, Tensor]:
        """Random images."""
        config: Any = self.model.config
        device = next(self.model.parameters()).device
        pixels = torch.randn(self.batch_size, 3, config.image_size, config.image_size, device=device)
        return {"pixel_values": pixels, "labels": torch.arange(self.batch_size, device=device) % config.num_labels}

    def training_step(self, math_attention: bool, samples: int | None = None) -> Callable[[], None]:
        """Forward and backward of a batch, or of some samples of it; the optimizer is left out of either side."""

        def step() -> None:
            batch = take(self.batch(), range(samples or self.batch_size))
            with sdpa_kernel([SDPBackend.MATH] if math_attention else _ALL_KERNELS):
                torch.autograd.grad(mean_loss(self.model, batch), list(self.model.parameters()), allow_unused=True)

        return step

    def iteration(self, way: str, host_read: bool) -> Callable[[], Tensor]:
        """One batch by a way, and what the host reads of it.

        Returns:
            A function that gives dJ/domega; the norms of the first pass alone.
        """
        match way:
            case "joint":
                return lambda: self._joint().scale_gradient
            case "first_pass":
                return lambda: self._first_pass(self.windows, host_read)
            case _:
                path, in_parts = PATHS[way]
                largest = max(map(len, self.windows))
                return lambda: self._two_passes(path, -(-largest // 2) if in_parts else None, host_read)

    def double_graph(self, samples: int) -> Callable[[], None]:
        """Gradient with a graph of some samples, and a product through it: the unit of memory of the exact paths."""

        def work() -> None:
            batch = take(self.batch(), range(samples))
            with measuring(self.model):
                exact_product(self._loss(), self.tensors, batch, _ones_like, seed=0)

        return work

    def sample_wise(self) -> Callable[[], Tensor]:
        """GradCosine of D = B."""
        return lambda: self._first_pass(sub_batch_windows(self.batch_size, self.batch_size), host_read=False)

    def scale_gradient(self, path: str, precision: torch.dtype | None = None) -> Tensor:
        """The scale gradient of one fixed batch, for errors of one path against another."""
        set_seed(0)
        return self._two_passes(PATHS[path][0], None, False, precision)

    def run(self, config: NIOConfig) -> InitResult:
        """A whole run on random batches; it changes the weights."""
        batches = [self.batch() for _ in range(config.report_batches + config.batches)]
        return initialize(self.model, batches, mean_loss, config, collective=self.collective)

    def _loss(self, precision: torch.dtype | None = None) -> Loss:
        return Loss(self.model, mean_loss, next(self.model.parameters()).device, precision)

    def _split(self, loss: Loss, windows: Sequence[Sequence[int]], micro: int | None = None) -> SubBatches:
        return split(self.batch(), windows, loss, self.collective, where="batch", micro_batch_size=micro)

    def _first_pass(self, windows: Sequence[Sequence[int]], host_read: bool) -> Tensor:
        loss = self._loss()
        with measuring(self.model):
            parts = self._split(loss, windows)
            first = first_pass(loss, self.tensors.gradient_parameters, parts, self.collective)
            if host_read:
                read(first.sums, parts)
            return first.sums.norms

    def _two_passes(
        self, path: Path, micro: int | None, host_read: bool, precision: torch.dtype | None = None
    ) -> Tensor:
        loss, tensors = self._loss(precision), self.tensors
        initial = [parameter.detach() for parameter in tensors.scaled_parameters]
        with measuring(self.model):
            parts = self._split(loss, self.windows, micro)
            first = first_pass(
                loss, tensors.gradient_parameters, parts, self.collective, micro_batch_size=micro, keep=path.keep
            )
            if host_read:
                read(first.sums, parts)
            objective = CosineObjective()
            gradient, _ = second_pass(loss, tensors, parts, first, objective, initial, path, self.collective)
            return gradient

    def _joint(self) -> Reference:
        batch = self.batch()
        with measuring(self.model):
            return joint_graph(
                self.model,
                lambda model: _losses_of_one_forward(model, batch, self.windows),
                gradient=[place.name for place in self.tensors.gradient],
                scaled=[place.name for place in self.tensors.scaled],
            )


def workload(
    name: str, device: torch.device, *, batch_size: int, sub_batches: int = 2, overlap: float = 0.0
) -> Workload:
    """A model of `MODELS` or `STUDY_MODELS` with fixed initial weights, in evaluation mode: no dropout on either side.

    On the device "meta" its tensors have shapes and no data: operations and bytes can be counted at any size.
    """
    set_seed(0)
    config = AutoConfig.for_model(**_fields(name))
    model: nn.Module = AutoModelForImageClassification.from_config(config, dtype=torch.float32).eval()
    if device.type != "meta":
        model.to(device)
    tensors = find_tensors(model)
    if device.type == "meta":
        for tensor in (*model.parameters(), *model.buffers()):
            empty = torch.empty_like(tensor, device="meta")
            torch.utils.swap_tensors(tensor, nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty)
    return Workload(model, tensors, batch_size, sub_batches, overlap)


def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of a batch."""
    return nn.functional.cross_entropy(model(pixel_values=batch["pixel_values"]).logits, batch["labels"])


@functools.cache
def _fields(name: str) -> dict[str, Any]:
    """Fields of the configuration of a model."""
    if name in _MODELS:
        return {**_MODELS[name], "num_labels": _CLASSES}
    recipe = read_settings(FilePath(__file__).parent / "warmup_free" / f"{name}.yaml")
    return {"model_type": recipe["model_type"].value, **recipe["model_config"].value, "num_labels": _STUDY_CLASSES}


def _losses_of_one_forward(model: nn.Module, batch: dict[str, Tensor], windows: list[list[int]]) -> list[Tensor]:
    """The losses of the sub-batches from one forward of the whole batch, as the published code takes them."""
    logits = model(pixel_values=batch["pixel_values"]).logits
    return [nn.functional.cross_entropy(logits[window], batch["labels"][window]) for window in windows]


def _ones_like(gradient: list[Tensor]) -> list[Tensor]:
    return [torch.ones_like(part) for part in gradient]
