"""What can be measured of a model before its first step, on a few batches.

Letters: N samples, P numbers in the weight matrices of the groups, g_i gradient of sample i, g_d mean gradient of
sub-batch d, D sub-batches, s = sign(g) the direction of Adam's first step. All means of cosines are over pairs of
different sub-batches or samples. The gradient is that of all matrices that are scaled: embeddings and head included.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.layer_scales.trainings import Setup, grouped_tensors, loss_of

SUB_BATCHES = (2, 4, 8, 16)
"""D of each half of the samples."""
SIGN_SUB_BATCHES = 4
CHUNK = 32
STEP_SIZES = (1e-4, 1e-3)
"""Learning rates of Adam's first step."""
CURVATURE_STEP = 1e-5
TINY = 1e-12


def measure(model: nn.Module, setup: Setup, pixels: Tensor, labels: Tensor) -> dict[str, float]:
    """All quantities of a model, by name.

    Args:
        model: at its initialisation; it is left as it is.
        setup: names the groups and the residual blocks.
        pixels: (N, C, H, W), an even number of samples.
        labels: (N,).
    """
    model.eval()
    groups = grouped_tensors(model, setup)
    tensors = [tensor for members in groups.values() for tensor in members]
    found = _outputs(model, setup, pixels, labels)
    by_sample = _sample_gradients(model, tensors, pixels, labels)
    found |= _from_grams(by_sample, groups, labels)
    found |= _from_vectors(by_sample, tensors)
    found |= _first_step(model, tensors, by_sample, pixels, labels)
    for group, members in groups.items():
        total = sum(tensor.numel() for tensor in members)
        found[f"rms.{group}"] = math.sqrt(sum(float(tensor.detach().square().sum()) for tensor in members) / total)
    model.train()
    return found


@torch.no_grad()
def _outputs(model: nn.Module, setup: Setup, pixels: Tensor, labels: Tensor) -> dict[str, float]:
    """Loss, logits, last features and what each block adds to the residual stream."""
    shares: list[float] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        after = output[0] if isinstance(output, tuple) else output
        assert isinstance(after, Tensor)
        shares.append(float((after - inputs[0]).norm() / after.norm()))

    features: list[Tensor] = []
    blocks = [module for name, module in model.named_modules() if re.search(setup.block, name)]
    handles = [block.register_forward_hook(record) for block in blocks]
    handles.append(
        model.get_submodule("classifier").register_forward_pre_hook(lambda _, args: features.append(args[0]))
    )
    try:
        logits = model(pixel_values=pixels).logits
    finally:
        for handle in handles:
            handle.remove()
    probabilities = logits.softmax(-1)
    last = features[0].reshape(len(pixels), -1)
    centred = last - last.mean(0)
    unit = nn.functional.normalize(last, dim=1)
    off_diagonal = ~torch.eye(len(pixels), dtype=torch.bool)
    spectrum = torch.linalg.svdvals(centred).square()
    spectrum = spectrum / spectrum.sum().clamp_min(TINY)
    means = torch.stack([last[labels == label].mean(0) for label in labels.unique()])
    between = float((means - last.mean(0)).square().sum(1).mean())
    return {
        "loss": float(nn.functional.cross_entropy(logits, labels)),
        "logit_spread": float(logits.std(0).mean()),
        "logit_size": float(logits.square().mean().sqrt()),
        "entropy": float(-(probabilities * probabilities.clamp_min(TINY).log()).sum(-1).mean()),
        "block_share_first": shares[0],
        "block_share_last": shares[-1],
        "block_share_mean": sum(shares) / len(shares),
        "block_share_least": min(shares),
        "block_share_spread": max(shares) / max(min(shares), TINY),
        "feature_rank": float((-(spectrum * spectrum.clamp_min(TINY).log()).sum()).exp()),
        "feature_participation": float(1 / spectrum.square().sum().clamp_min(TINY)),
        "feature_cosine": float((unit @ unit.T)[off_diagonal].mean()),
        "feature_separation": between / max(float(centred.square().sum(1).mean()), TINY),
        "feature_alignment": _alignment(centred @ centred.T, labels),
    }


def _sample_gradients(model: nn.Module, tensors: list[nn.Parameter], pixels: Tensor, labels: Tensor) -> list[Tensor]:
    """For each tensor the (N, its size) gradients of the samples."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    values = {names[id(tensor)]: tensor.detach() for tensor in tensors}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, weights, (), {"pixel_values": image[None]}).logits
        return nn.functional.cross_entropy(logits, label[None])

    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", "There is a performance drop")
        rows = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=CHUNK)(values, pixels, labels)
    return [rows[names[id(tensor)]].detach().flatten(1) for tensor in tensors]


def _from_grams(by_sample: list[Tensor], groups: Mapping[str, list[nn.Parameter]], labels: Tensor) -> dict[str, float]:
    """What follows from the inner products of the gradients of the samples, in all and in each group."""
    count = len(labels)
    grams, position = {}, 0
    for group, members in groups.items():
        grams[group] = sum(rows @ rows.T for rows in by_sample[position : position + len(members)])
        position += len(members)
    whole = sum(grams.values())
    body = sum(gram for group, gram in grams.items() if group != "head")
    trunk = sum(gram for group, gram in grams.items() if group not in ("head", "positions", "patches", "reductions"))
    found: dict[str, float] = {}
    for parts in SUB_BATCHES:
        found[f"gc.d{parts}"], found[f"gn.d{parts}"] = _cosine_and_norm(whole, parts)
        found[f"gc_body.d{parts}"], found[f"gn_body.d{parts}"] = _cosine_and_norm(body, parts)
    found["gc_trunk.d4"], found["gn_trunk.d4"] = _cosine_and_norm(trunk, 4)
    found["gc.samples"], found["gn.samples"] = _cosine_and_norm(whole, count // 2)
    found["gn.all"] = float(whole.mean().sqrt())
    found["gn.noise"] = float(whole.diagonal().mean() / whole.mean())
    norms = whole.diagonal().clamp_min(TINY).sqrt()
    cosines = whole / norms[:, None] / norms
    same = labels[:, None] == labels
    other = ~same
    same = same & ~torch.eye(count, dtype=torch.bool)
    found["cosine.within"] = float(cosines[same].mean())
    found["cosine.between"] = float(cosines[other].mean())
    found["cosine.gap"] = found["cosine.within"] - found["cosine.between"]
    found["gram_alignment"] = _alignment(_centred(whole), labels)
    values = torch.linalg.eigvalsh(_centred(whole).double()).clamp_min(0)
    found["gram_participation"] = float(values.sum().square() / values.square().sum().clamp_min(TINY))
    for group, gram in grams.items():
        found[f"gc.d4.{group}"], found[f"gn.d4.{group}"] = _cosine_and_norm(gram, 4)
    return found


def _from_vectors(by_sample: list[Tensor], tensors: list[nn.Parameter]) -> dict[str, float]:
    """Signs and first moments, which inner products do not tell."""
    count = len(by_sample[0])
    halves = torch.arange(count).split(count // 2)
    pairs = SIGN_SUB_BATCHES * (SIGN_SUB_BATCHES - 1)
    agreements, tensor_cosines, descents, relative = [], [], [], []
    for half in halves:
        parts = half.split(len(half) // SIGN_SUB_BATCHES)
        total_sign, size = 0.0, 0
        for rows in by_sample:
            means = torch.stack([rows[part].mean(0) for part in parts])
            signs = means.sign()
            total_sign += float(signs.sum(0).square().sum() - signs.square().sum())
            size += rows.shape[1]
            unit = nn.functional.normalize(means, dim=1)
            tensor_cosines.append(float(unit.sum(0).square().sum() - unit.square().sum()))
        agreements.append(total_sign / pairs / size)
    first, second = halves
    for one, two in ((first, second), (second, first)):
        signs = [rows[one].mean(0).sign() for rows in by_sample]
        slopes = [float(sign @ rows[two].mean(0)) for sign, rows in zip(signs, by_sample, strict=True)]
        descents.append(sum(slopes))
        relative.append(
            sum(
                slope * float(tensor.detach().square().mean().sqrt())
                for slope, tensor in zip(slopes, tensors, strict=True)
            )
        )
    mean = [rows.mean(0) for rows in by_sample]
    return {
        "gc_sign.d4": sum(agreements) / len(agreements),
        "gc_tensor_mean.d4": sum(tensor_cosines) / len(tensor_cosines) / pairs,
        "l1": sum(float(part.abs().sum()) for part in mean),
        "descent_sign": sum(descents) / len(descents),
        "descent_sign_relative": sum(relative) / len(relative),
        "descent_sgd": sum(float(rows[first].mean(0) @ rows[second].mean(0)) for rows in by_sample),
    }


def _first_step(
    model: nn.Module, tensors: list[nn.Parameter], by_sample: list[Tensor], pixels: Tensor, labels: Tensor
) -> dict[str, float]:
    """What Adam's first step on the first half of the samples does to the other half."""
    half = len(labels) // 2
    signs = [rows[:half].mean(0).sign().view_as(tensor) for rows, tensor in zip(by_sample, tensors, strict=True)]
    other, other_labels = pixels[half:], labels[half:]
    with torch.no_grad():
        before = model(pixel_values=other).logits
    loss_before = float(nn.functional.cross_entropy(before, other_labels))
    spread = float(before.std(0).mean())
    found: dict[str, float] = {}
    for size in STEP_SIZES:
        with _moved(tensors, signs, -size), torch.no_grad():
            after = model(pixel_values=other).logits
        found[f"step_loss.{size:g}"] = float(nn.functional.cross_entropy(after, other_labels)) - loss_before
        found[f"step_output.{size:g}"] = float((after - before).square().mean().sqrt())
        found[f"step_output_relative.{size:g}"] = found[f"step_output.{size:g}"] / max(spread, TINY)
    slopes = []
    for sign in (1, -1):
        with _moved(tensors, signs, sign * CURVATURE_STEP):
            gradient = torch.autograd.grad(loss_of(model, other, other_labels), tensors)
        slopes.append(sum(float((g * s).sum()) for g, s in zip(gradient, signs, strict=True)))
    curvature = (slopes[0] - slopes[1]) / (2 * CURVATURE_STEP)
    slope = (slopes[0] + slopes[1]) / 2
    found["step_curvature"] = curvature
    found["step_best_size"] = slope / curvature if curvature > 0 else math.inf
    return found


@contextlib.contextmanager
def _moved(tensors: list[nn.Parameter], directions: list[Tensor], size: float) -> Iterator[None]:
    saved = [tensor.detach().clone() for tensor in tensors]
    try:
        with torch.no_grad():
            for tensor, direction in zip(tensors, directions, strict=True):
                tensor.add_(direction, alpha=size)
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)


def _cosine_and_norm(gram: Tensor, parts: int) -> tuple[float, float]:
    """GC and GN of D sub-batches of each half of the samples, the mean over the halves."""
    count = len(gram)
    cosines, norms = [], []
    for half in torch.arange(count).split(count // 2):
        own = gram[half][:, half].double()
        size = len(half) // parts
        inner = own.view(parts, size, parts, size).mean((1, 3))
        lengths = inner.diagonal().clamp_min(TINY**2).sqrt()
        normalised = inner / lengths[:, None] / lengths
        cosines.append(float((normalised.sum() - parts) / (parts * (parts - 1))))
        norms.append(float(lengths.mean()))
    return sum(cosines) / 2, sum(norms) / 2


def _centred(gram: Tensor) -> Tensor:
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


def _alignment(kernel: Tensor, labels: Tensor) -> float:
    """Centred alignment of a kernel with that of the labels, in [-1, 1]."""
    target = _centred((labels[:, None] == labels).double())
    own = kernel.double()
    return float((own * target).sum() / (own.norm() * target.norm()).clamp_min(TINY))
