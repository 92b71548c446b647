"""GradCosine along the common factor and along the scale of positions, with the head's offsets and without.

python -m benchmarks.layer_scales.offsets ../shared/data

A head that is drawn at random gives every sample about the same logits. The gradient that corrects them is common to
all samples, so that sub-batches agree on it. Times a small number, logits are nearly equal for all classes, whatever
the weights are: what agrees then is the signal alone. Prints GC and GN, the mean over seeds and four batches of 64
(GPT-2: 16 sequences of 128 bytes), and writes them to benchmarks/results/layer-scales/offsets.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.layer_scales.landscape import RESULTS
from benchmarks.layer_scales.trainings import SETUPS, batches, build_model, grouped_tensors, load_images
from nio_hf import grad_cosine

FACTORS = (1.0, 2.0, 2.8, 4.0, 5.7, 8.0)
POSITIONS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
LOGIT_SCALES = (1.0, 0.05)
COMMON = {"vit": 4.0, "digits": 4.0, "gpt2": 2.0}
"""{model: common factor beside which positions grow}."""
SEEDS, BATCHES, SUB_BATCHES = range(3), 4, 4
BLOCK, SEQUENCES, FILES = 128, 16, 60
Given = tuple[nn.Module, list[nn.Parameter], list[nn.Parameter], list[Any]]
"""A model, its weight matrices, those of them that are positions, and batches."""


def image_model(name: str, seed: int, data: Path) -> Given:
    """A small model of this benchmark."""
    setup = SETUPS[name]
    model, images = build_model(name, seed), load_images(setup.data, data)
    groups = grouped_tensors(model, setup)
    drawn = list(itertools.islice(batches(images, setup, seed, flip=False), BATCHES))
    return model, [tensor for members in groups.values() for tensor in members], groups.get("positions", []), drawn


def text_model(seed: int) -> Given:
    """GPT-2 of four layers and width 128 on the bytes of Python's standard library."""
    torch.manual_seed(seed)
    sizes = {"n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": BLOCK, "vocab_size": 256}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0))
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:FILES]
    text = torch.tensor(list(b"".join(file.read_bytes() for file in files)))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - BLOCK, (BATCHES, SEQUENCES), generator=generator).tolist()
    drawn = [(torch.stack([text[start : start + BLOCK] for start in row]),) for row in starts]
    return model, [p for p in model.parameters() if p.ndim > 1], [model.transformer.wpe.weight], drawn


def loss_with(logit_scale: float) -> Callable[[nn.Module, Any], Tensor]:
    """Mean cross-entropy of the logits times a number."""

    def loss_fn(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        if isinstance(model, GPT2LMHeadModel):
            logits, labels = model(input_ids=batch[0]).logits[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten()
        else:
            logits, labels = model(pixel_values=batch[0]).logits, batch[1]
        return nn.functional.cross_entropy(logit_scale * logits, labels)

    return loss_fn


def along(given: Given, tensors: Sequence[nn.Parameter], factors: Sequence[float]) -> Iterator[dict[str, float]]:
    """GC and GN at each factor of some tensors, for each scale of the logits; the model is left as it was."""
    model, _, _, drawn = given
    initial = [tensor.detach().clone() for tensor in tensors]
    for factor, logit_scale in itertools.product(factors, LOGIT_SCALES):
        with torch.no_grad():
            torch._foreach_copy_(list(tensors), torch._foreach_mul(initial, factor))
        found = [grad_cosine(model, batch, loss_with(logit_scale), sub_batches=SUB_BATCHES) for batch in drawn]
        yield {
            "factor": factor,
            "logit_scale": logit_scale,
            "grad_cosine": statistics.fmean(one.value for one in found),
            "grad_norm": statistics.fmean(one.grad_norm for one in found) / logit_scale,
        }
    with torch.no_grad():
        torch._foreach_copy_(list(tensors), initial)


def main() -> int:
    """Measure, print and write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with cifar10")
    data = parser.parse_args().data
    torch.set_num_threads(1)
    table: dict[str, list[dict[str, Any]]] = {}
    for name, seed in itertools.product(("vit", "swin", "digits", "gpt2"), SEEDS):
        given = text_model(seed) if name == "gpt2" else image_model(name, seed, data)
        _, weights, positions, _ = given
        rows = [{"along": "all", "seed": seed, **row} for row in along(given, weights, FACTORS)]
        if positions:
            with torch.no_grad():
                torch._foreach_mul_(weights, COMMON[name])
            rows += [{"along": "positions", "seed": seed, **row} for row in along(given, positions, POSITIONS)]
        table.setdefault(name, []).extend(rows)
    (RESULTS / "offsets.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for name, along_what, logit_scale in itertools.product(table, ("all", "positions"), LOGIT_SCALES):
        own = [r for r in table[name] if (r["along"], r["logit_scale"]) == (along_what, logit_scale)]
        cells = []
        for factor in dict.fromkeys(row["factor"] for row in own):
            at = [row for row in own if row["factor"] == factor]
            gc, gn = (statistics.fmean(row[key] for row in at) for key in ("grad_cosine", "grad_norm"))
            cells.append(f"x{factor:g} {gc:.3f} ({gn:.2f})")
        if cells:
            sys.stdout.write(f"| {name}, {along_what}, logits x{logit_scale:g} | {' | '.join(cells)} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
