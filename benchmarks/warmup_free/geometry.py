"""What agreement of gradients says along one factor of all weights, for several ways to measure it.

python -m benchmarks.warmup_free.geometry ../shared/data

All weight matrices are multiplied by one factor a, and everything is measured at a. Letters: g_1..g_D gradients of
sub-batches, P their size, v the mean squared gradient on other batches.

    GradCosine            mean over pairs of cos(g_i, g_j), of all trainable tensors, as NIO does
      of matrices         only tensors of two or more dimensions
      of blocks           only those between the embedding and the head
    sign cosine           mean over pairs of <sign g_i, sign g_j> / P: the geometry of Adam's first step
    preconditioned        mean over pairs of cos(g_i / s, g_j / s), s = sqrt v + eps: the geometry of Adam that knows v
    gradient norm         mean of ||g_d||
    L1 norm               mean of ||g_d||_1 / sqrt P, what the constraint of GradInit bounds for Adam
    loss                  at the initialisation
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.warmup_free.study import FOLDER, RESULTS, data_options
from nio_hf.core.batches import take
from nio_hf.core.mode import measuring
from nio_hf.core.tensors import find_tensors, set_scales
from nio_hf.hub.run_folder import versions
from nio_hf.image_training.building import build_trainer
from nio_hf.image_training.trainer import ImageTrainer
from nio_hf.recipe.loading import load_recipe
from nio_hf.report.style import BLUE, DARK, GREEN, GREY, ORANGE, PURPLE, VERMILLION, figure

FACTORS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.0)
SEEDS = range(3)
BATCHES, SUB_BATCHES = 8, 4
RATIO_TICKS = (1, 2, 4, 8)
TINY, ADAM_EPS = 1e-12, 1e-8
MATRIX = 2
IN_BLOCK = re.compile(r"layers?\.\d+\.")
COSINES = {
    "grad_cosine": ("GradCosine", {"color": BLUE}),
    "sign_cosine": ("sign cosine", {"color": VERMILLION}),
    "preconditioned_cosine": ("preconditioned", {"color": GREEN}),
    "matrices": ("of matrices", {"color": PURPLE, "linestyle": ":"}),
    "blocks": ("of blocks", {"color": DARK, "linestyle": "-."}),
}
RATIOS = {
    "grad_norm": ("gradient norm", {"color": ORANGE}),
    "l1_norm": ("L1 norm", {"color": PURPLE}),
    "loss": ("loss", {"color": GREY}),
}


def sub_batch_gradients(trainer: ImageTrainer, batch: Any, tensors: Sequence[nn.Parameter]) -> tuple[Tensor, float]:
    """(D, P) gradients of the sub-batches of a batch, and their mean loss."""
    model = trainer.model
    assert isinstance(model, nn.Module)
    rows, losses = [], []
    size = len(batch["labels"]) // SUB_BATCHES
    for part in range(SUB_BATCHES):
        loss = trainer.compute_nio_loss(model, take(batch, list(range(part * size, (part + 1) * size))))
        assert isinstance(loss, Tensor)
        rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(tensors))]))
        losses.append(loss.item())
    return torch.stack(rows), statistics.fmean(losses)


def mean_cosine(rows: Tensor) -> float:
    """Mean over pairs i != j of cos(rows_i, rows_j)."""
    units = rows / rows.norm(dim=1, keepdim=True).clamp(min=TINY)
    count = len(units)
    return float((units.sum(dim=0).square().sum() - count) / (count * (count - 1)))


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where the tensors lie in a row of gradients.

    Attributes:
        tensors: all trainable ones, in the order of a row.
        subsets: {quantity: (P,) what its cosine is of}.
    """

    tensors: list[nn.Parameter]
    subsets: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Columns:
        """The columns of a model."""
        named = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}

        def where(is_in: Callable[[str, nn.Parameter], bool]) -> Tensor:
            return torch.cat([torch.full((tensor.numel(),), is_in(name, tensor)) for name, tensor in named.items()])

        subsets = {
            "matrices": where(lambda name, tensor: tensor.ndim >= MATRIX),
            "blocks": where(lambda name, tensor: IN_BLOCK.search(name) is not None),
        }
        return cls(list(named.values()), subsets)


def measured(trainer: ImageTrainer, batches: Sequence[Any], columns: Columns) -> dict[str, float]:
    """All quantities, the mean over the first half of the batches; v is that of the second half."""
    half = len(batches) // 2
    tensors = columns.tensors
    other = torch.stack([sub_batch_gradients(trainer, batch, tensors)[0].square().mean(0) for batch in batches[half:]])
    root = other.mean(dim=0).sqrt()
    found: list[dict[str, float]] = []
    for batch in batches[:half]:
        rows, loss = sub_batch_gradients(trainer, batch, tensors)
        found.append(
            {
                **{name: mean_cosine(rows[:, chosen]) for name, chosen in columns.subsets.items()},
                "grad_cosine": mean_cosine(rows),
                "sign_cosine": mean_cosine(rows.sign()),
                "preconditioned_cosine": mean_cosine(rows / (root + ADAM_EPS)),
                "grad_norm": float(rows.norm(dim=1).mean()),
                "l1_norm": float(rows.abs().sum(dim=1).mean() / rows.shape[1] ** 0.5),
                "loss": loss,
            }
        )
    return {key: statistics.fmean(entry[key] for entry in found) for key in found[0]}


def options_of(data: Path, seed: int) -> list[str]:
    """What a recipe of the study lacks."""
    return [*data_options("cifar10", data), f"--seed={seed}", "--report_to=none"]


def along_the_factor(recipe: str, data: Path, seed: int) -> list[dict[str, float]]:
    """The quantities at each factor."""
    options = [*options_of(data, seed), f"--nio_report_batches={BATCHES}"]
    trainer = build_trainer(load_recipe(str(FOLDER / f"{recipe}.yaml"), options))
    model = trainer.model
    assert isinstance(model, nn.Module)
    tensors = find_tensors(model, "weights")
    columns = Columns.of(model)
    initial = [parameter.detach().clone() for parameter in tensors.scaled_parameters]
    loader = itertools.islice(trainer.get_nio_dataloader(), BATCHES)
    batches = [trainer.prepare_nio_batch(batch, number) for number, batch in enumerate(loader)]
    rows = []
    for factor in FACTORS:
        set_scales(tensors, initial, [factor] * len(initial))
        with measuring(model):
            rows.append({"factor": factor, **measured(trainer, batches, columns)})
    return rows


def draw(results: dict[str, list[list[dict[str, float]]]], target: Path) -> None:
    """A column for each model: the cosines, and what else changes, relative to factor 1; means over the seeds."""
    with figure(target, width=8, height=6.5) as drawn:
        panels = drawn.subplots(2, len(results), sharex=True, squeeze=False)
        for column, (name, seeds) in enumerate(results.items()):
            for axes, quantities in ((panels[0][column], COSINES), (panels[1][column], RATIOS)):
                for key, (label, look) in quantities.items():
                    start = next(index for index, row in enumerate(seeds[0]) if row["factor"] == 1)
                    units = [1.0 if key in COSINES else rows[start][key] for rows in seeds]
                    means = [
                        statistics.fmean(rows[index][key] / unit for rows, unit in zip(seeds, units, strict=True))
                        for index in range(len(FACTORS))
                    ]
                    axes.plot(FACTORS, means, marker="o", markersize=4, label=label, **look)
                axes.set_xscale("log")
                axes.set_xticks(FACTORS, [f"{factor:g}" for factor in FACTORS])
                axes.minorticks_off()
            panels[0][column].set_title(name)
            panels[1][column].set_yscale("log")
            panels[1][column].set_yticks(RATIO_TICKS, [f"{tick:g}" for tick in RATIO_TICKS])
            panels[1][column].minorticks_off()
            panels[1][column].set_xlabel("factor of all weights")
        panels[0][0].set_ylabel(f"cosine (D = {SUB_BATCHES}, B/D = 16)")
        panels[1][0].set_ylabel("relative to factor 1")
        panels[0][-1].legend(fontsize="small")
        panels[1][0].legend()
        drawn.align_ylabels()


def main() -> None:
    """Measure both models of the study, and write the numbers and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with cifar10/train.parquet and cifar10/test.parquet")
    data = parser.parse_args().data
    results = {name: [along_the_factor(name, data, seed) for seed in SEEDS] for name in ("vit", "swin")}
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {"versions": versions(), "batches": BATCHES // 2, "sub_batches": SUB_BATCHES, "seeds": results}
    (RESULTS / "geometry.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(results, RESULTS / "geometry.png")


if __name__ == "__main__":
    main()
