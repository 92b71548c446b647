"""One training of the study: a model, how it is initialised, its optimizer, and what came of it.

The loop is a plain one that reads its data once; the initialisations are those of the package. A run has a budget of
training steps, from which its initialisation is paid.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import schedulefree
import torch
from torch import Tensor, nn

from nio_hf import NIOConfig, initialize
from nio_hf.core import NIO, squared_gradients
from nio_hf.core.groups import kinds_of
from nio_hf.tasks.optimizers import MuonAndAdamW
from nio_hf.trainer.methods import METHODS
from nio_hf.trainer.seeding import seed_second_moment

RESULTS = Path(__file__).parent.parent / "results" / "warmup-free"
SEARCHED = RESULTS / "searched.json"
"""{model: {group: scale}} that the direct search has found."""
RESIDUAL = r"(c_proj|o_proj|down_proj|output\.dense)\.weight"
"""Names of the weights that lead into the residual stream of GPT-2, Llama and BERT."""
WINDOWS = 20
"""Parts of a training whose mean loss is kept."""
Row = dict[str, Any]


class Samples(Protocol):
    """What a training reads."""

    def batches(self, seed: int, *, plain: bool = False) -> Iterator[Any]:
        """Endless batches in an order that the seed fixes; plain ones are not augmented."""

    def evaluate(self, model: nn.Module) -> Row:
        """What the samples that choose or judge say: the loss and, of images, the accuracy in %."""


class Task(Protocol):
    """A training that arms share: a model, its data and its loop.

    Attributes:
        model: Its name.
        steps: Budget, initialisation included.
        batch_size: Samples of a step.
        weight_decay, betas: Of AdamW.
        most_norm: Norm that gradients are clipped to; None for no clipping.
        failure: What is said of a training that failed: what guessing would end at.
    """

    model: str
    steps: int
    batch_size: int
    weight_decay: float
    betas: tuple[float, float]
    most_norm: float | None
    failure: Row

    @property
    def groups(self) -> Mapping[str, str]:
        """{group of weight matrices that a direct search scales: regular expression that their names contain}."""

    def build(self, seed: int) -> nn.Module:
        """The model as its class draws it."""

    def samples(self, data: Path, *, choosing: bool) -> Samples:
        """Its data; those that choose are set aside from the training."""

    def loss(self, model: nn.Module, batch: Any) -> Any:
        """Mean loss of a batch, or (sum, weight), as [`initialize`] takes it."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is compared: an initialisation and an optimizer.

    Attributes:
        draws: (method, its options), one after the other; none for the class's own.
        optimizer: "adamw", "radam", "schedule_free" or "muon".
        warmup: share of the steps with a linear warmup.
        seeded: whether Adam's second moment is seeded (GI-Adam).
        searched: whether groups are scaled as the direct search found.
        published: whether NIO has the settings of its paper, in the place of the defaults.
        strength: of NIO.
        residual: whether weights that lead into the residual stream are scaled as GPT-2's class scales them.
        rates: learning rates that are tried first.
    """

    draws: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    optimizer: str = "adamw"
    warmup: float = 0.0
    seeded: bool = False
    searched: bool = False
    published: bool = False
    strength: float = 1.0
    residual: bool = False
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)


_HIGHER = (1e-3, 2e-3, 4e-3)
_NIO = ("nio", {})
ARMS = {
    "class": Arm(),
    "warmup2": Arm(warmup=0.02),
    "warmup5": Arm(warmup=0.05),
    "warmup10": Arm(warmup=0.1),
    "warmup30": Arm(warmup=0.3),
    "x2": Arm((("range", {"factor": 2.0}),)),
    "x4": Arm((("range", {"factor": 4.0}),)),
    "width": Arm((("range", {}),)),
    "residual": Arm(residual=True),
    "xavier": Arm((("xavier", {}),)),
    "mimetic": Arm((("mimetic", {}),)),
    "structured": Arm((("structured", {}),)),
    "lsuv": Arm((("lsuv", {}),)),
    "positions8": Arm((("range", {"factor": 4.0, "additive": 8.0}),)),
    "positions32": Arm((("range", {"factor": 4.0, "additive": 32.0}),)),
    "searched": Arm(searched=True),
    "gi_adam": Arm(seeded=True, rates=_HIGHER),
    "radam": Arm(optimizer="radam", rates=_HIGHER),
    "schedule_free": Arm(optimizer="schedule_free", rates=_HIGHER),
    "muon": Arm(optimizer="muon", rates=_HIGHER),
    "nio": Arm((_NIO,)),
    "nio_half": Arm((_NIO,), strength=0.5),
    "nio_warmup10": Arm((_NIO,), warmup=0.1),
    "nio_seeded": Arm((_NIO,), seeded=True, rates=_HIGHER),
    "nio_muon": Arm((_NIO,), optimizer="muon", rates=_HIGHER),
    "published": Arm((_NIO,), published=True),
    "xavier_nio": Arm((("xavier", {}), _NIO)),
    "mimetic_nio": Arm((("mimetic", {}), _NIO)),
}
"""{name: arm}."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        task: name of the part of the study.
        arm: its name.
        learning_rate: peak.
        seed: of weights and order of the data.
        choosing: whether it chooses the learning rate, on images that are set aside from the training.
    """

    task: str
    arm: str
    learning_rate: float
    seed: int
    choosing: bool


def carry_out(run: Run, task: Task, data: Path) -> Row:
    """Initialise, train for what is left of the budget, and evaluate."""
    started, arm = time.perf_counter(), ARMS[run.arm]
    samples = task.samples(data, choosing=run.choosing)
    model = task.build(run.seed)
    settings = {"seed": run.seed, "strength": arm.strength}
    config = NIOConfig.published(**settings) if arm.published else NIOConfig(**settings)
    draws = [(METHODS[name], METHODS[name].checked(options)) for name, options in arm.draws]
    further = max((method.batches(config, options) for method, options in draws), default=0)
    drawn = list(itertools.islice(samples.batches(run.seed, plain=True), config.report_batches + further))
    found: Row = {}
    cost = 0.0
    if arm.searched:
        scale_groups(model, task.groups, json.loads(SEARCHED.read_text(encoding="utf-8"))[task.model])
    if arm.residual:
        scale_residual_projections(model)
    for method, options in draws:
        result = initialize(model, drawn, task.loss, config, method=method, options=options)
        # NIO judges its scales by the report batches.
        if method is NIO or method.batches(config, options):
            cost += result.cost
        if method is NIO:
            found = {"scales": {group.name: _short(group.omega) for group in result.groups}, "status": result.status}
    squares = None
    if arm.seeded:
        reported = drawn[: config.report_batches]
        squares = squared_gradients(model, reported, task.loss, config, training_batch_size=task.batch_size)
        cost += len(reported)
    steps = task.steps - math.ceil(cost)
    losses = _descend(
        model, task, samples, run, steps, _optimizer(arm, task, model, run.learning_rate, squares), _schedule(arm)
    )
    ended = _ending(task, samples, model, losses, steps)
    if run.choosing:
        ended.pop("right", None)
    seconds = round(time.perf_counter() - started, 1)
    return {**dataclasses.asdict(run), **found, "cost": _short(cost), **ended, "seconds": seconds}


def carry_out_scaled(task: Task, exponents: Mapping[str, float], learning_rate: float, seed: int, data: Path) -> Row:
    """Train with groups scaled by powers of 2, and evaluate on samples that are set aside."""
    run = Run("", "class", learning_rate, seed, choosing=True)
    samples = task.samples(data, choosing=True)
    model = task.build(seed)
    scale_groups(model, task.groups, {group: 2.0**exponent for group, exponent in exponents.items()})
    optimizer = _optimizer(ARMS["class"], task, model, learning_rate, None)
    losses = _descend(model, task, samples, run, task.steps, optimizer, cosine)
    ended = _ending(task, samples, model, losses, task.steps)
    kept = {key: ended[key] for key in ("accuracy", "loss", "losses") if key in ended}
    return {"exponents": dict(exponents), "seed": seed, "learning_rate": learning_rate, **kept}


def score(row: Row) -> float:
    """What a training is chosen and judged by, the higher, the better: accuracy in %, else minus the loss."""
    return row["accuracy"] if "accuracy" in row else -row["loss"]


@torch.no_grad()
def scale_groups(model: nn.Module, groups: Mapping[str, str], scales: Mapping[str, float]) -> None:
    """Multiply groups of weight matrices, in place."""
    for group, tensors in grouped_tensors(model, groups).items():
        for tensor in tensors:
            tensor.mul_(scales[group])


def grouped_tensors(model: nn.Module, groups: Mapping[str, str]) -> dict[str, list[nn.Parameter]]:
    """The weight matrices of each group; zero tables are in none.

    Raises:
        ValueError: Where the groups are no partition of them.
    """
    found: dict[str, list[nn.Parameter]] = {group: [] for group in groups}
    for name, parameter in model.named_parameters():
        owners = [group for group, pattern in groups.items() if re.search(pattern, name)]
        if parameter.ndim < 2 or not bool(parameter.detach().any()):
            # A token of zeros stays as it is.
            continue
        if len(owners) != 1:
            raise ValueError(f"{name} is in the groups {owners}")
        found[owners[0]].append(parameter)
    if not all(found.values()):
        raise ValueError(f"a group is empty: {found.keys()}")
    return found


@torch.no_grad()
def scale_residual_projections(model: nn.Module) -> None:
    """Divide the weights that lead into the residual stream by sqrt(2 layers), as the class of GPT-2 does."""
    layers = model.config.num_hidden_layers
    for name, weight in model.named_parameters():
        if re.search(RESIDUAL, name):
            weight.div_(math.sqrt(2 * layers))


def mean_loss(task: Task) -> Callable[[nn.Module, Any], Tensor]:
    """(model, batch) -> mean loss."""

    def mean(model: nn.Module, batch: Any) -> Tensor:
        loss = task.loss(model, batch)
        return loss[0] / loss[1] if isinstance(loss, tuple) else loss

    return mean


def _descend(
    model: nn.Module,
    task: Task,
    samples: Samples,
    run: Run,
    steps: int,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int, int], float],
) -> list[float]:
    return descend(
        model,
        samples.batches(run.seed),
        mean_loss(task),
        steps=steps,
        learning_rate=run.learning_rate,
        optimizer=optimizer,
        schedule=schedule,
        most_norm=task.most_norm,
    )


def _ending(task: Task, samples: Samples, model: nn.Module, losses: list[float], steps: int) -> Row:
    """What a training ended at; what guessing would end at where it failed."""
    failed = len(losses) < steps or not math.isfinite(losses[-1])
    found = samples.evaluate(model)
    loss = _short(found["loss"]) if math.isfinite(found["loss"]) else None
    guessed = task.failure if failed or loss is None else {}
    return {**found, "loss": loss, **guessed, "steps": len(losses), "failed": failed, "losses": _curve(losses)}


def cosine(step: int, steps: int) -> float:
    """Share of the learning rate at a step: from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def descend(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    steps: int,
    learning_rate: float,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int, int], float] = cosine,
    most_norm: float | None = None,
) -> list[float]:
    """The steps of a training; returns their losses, which end where one is not finite.

    Args:
        model: As it starts.
        batches: At least `steps` of them.
        loss: (model, batch) -> mean loss.
        steps: Number of steps.
        learning_rate: Peak.
        optimizer: Its optimizer.
        schedule: (step, steps) -> share of the learning rate.
        most_norm: Norm that gradients are clipped to; None for no clipping.
    """
    losses: list[float] = []
    model.train()
    for step, batch in enumerate(itertools.islice(batches, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(step, steps)
        mean = loss(model, batch)
        losses.append(float(mean.detach()))
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad()
        mean.backward()
        if most_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), most_norm)
        optimizer.step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return losses


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """The parameters for an optimizer: weight decay on those of two dimensions and more."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _optimizer(
    arm: Arm, task: Task, model: nn.Module, learning_rate: float, squares: Mapping[str, Tensor] | None
) -> torch.optim.Optimizer:
    groups = parameter_groups(model, task.weight_decay)
    match arm.optimizer:
        case "radam":
            return torch.optim.RAdam(groups, decoupled_weight_decay=True, foreach=True)
        case "schedule_free":
            free = schedulefree.RAdamScheduleFree(groups, lr=learning_rate)
            free.train()
            return free
        case "muon":
            kinds = kinds_of(model)
            matrices = [weight for name, weight in model.named_parameters() if kinds[name] == "trunk"]
            return MuonAndAdamW(groups, matrices=[weight for weight in matrices if weight.ndim == 2], lr=learning_rate)
    optimizer = torch.optim.AdamW(groups, betas=task.betas, foreach=True)
    if squares is not None:
        seed_second_moment(optimizer, model, squares, "gi_adam")
    return optimizer


def _schedule(arm: Arm) -> Callable[[int, int], float]:
    """(step, steps) -> share of the learning rate: linear warmup, then cosine; constant where schedule-free."""

    def share(step: int, steps: int) -> float:
        if arm.optimizer == "schedule_free":
            return 1.0
        rising = round(arm.warmup * steps)
        return step / rising if step < rising else cosine(step - rising, steps - rising)

    return share


def _curve(losses: list[float]) -> list[float | None]:
    """Mean losses of equal parts of the training."""
    bounds = [len(losses) * number // WINDOWS for number in range(WINDOWS + 1)]
    windows = [losses[start:end] for start, end in itertools.pairwise(bounds) if end > start]
    means = [sum(window) / len(window) for window in windows]
    return [_short(mean) if math.isfinite(mean) else None for mean in means]


def _short(value: float) -> float:
    return float(f"{value:.5g}")
