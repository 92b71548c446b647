"""One run of a study, in a process of its own."""

from __future__ import annotations

import dataclasses
import logging
import math
import multiprocessing
import os
import sys
import threading
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainerCallback

from nio_hf.core.result import NIOResult
from nio_hf.errors import ConfigError, NIOError, NumericsError, Problem
from nio_hf.recipe.loading import Recipe
from nio_hf.study.costs import initialise
from nio_hf.study.diagnostics import StepDiagnostics
from nio_hf.study.results import Outcome
from nio_hf.tasks import build_trainer
from nio_hf.tasks.trainer import RecipeTrainer

_DIAGNOSTIC_SAMPLES = 64
"""Number of samples in the batch of the diagnostics."""


@dataclasses.dataclass(frozen=True)
class Order:
    """The order for the process of a run.

    Attributes:
        recipe: Recipe to train, whose output directory is temporary.
        log_file: File for the output of the process.
        cost_share: Share of the cost of the initialisation that is paid from the budget.
        diagnostics: Whether to measure the first steps.
        threads: Number of threads; None for the default of torch.
    """

    recipe: Recipe
    log_file: Path
    cost_share: float = 1.0
    diagnostics: bool = False
    threads: int | None = None


def carry_out(order: Order, sender: Connection) -> None:
    """Carry out a run, print to its log, and send its outcome or the [`NIOError`] that ended it.

    The process ends with the process that started it.
    """
    end_with_parent()
    with order.log_file.open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    logging.getLogger("nio_hf").setLevel(logging.INFO)
    if order.threads is not None:
        torch.set_num_threads(order.threads)
    try:
        sender.send(train_once(order.recipe, order.diagnostics, order.cost_share))
    except NIOError as error:
        if not error.problems:
            raise
        sender.send(error)


def end_with_parent() -> None:
    """End this process as soon as the process that started it has ended for any reason."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def train_once(recipe: Recipe, diagnostics: bool = False, cost_share: float = 1.0) -> Outcome:
    """Initialise a model, train it for the rest of the budget, and evaluate it.

    The budget is `max_steps` training steps. It pays for the initialisation, or for `cost_share` of it, and for the
    steps of a race, whose schedule is that of a training longer by as many steps.

    Raises:
        ConfigError: An initialisation that costs the whole budget. With a `cost_share` below 1 the run fails instead.
        NIOError: As in [`build_trainer`] and [`NIOTrainer`].
    """
    started = time.perf_counter()
    trainer = build_trainer(recipe)
    budget = trainer.args.max_steps
    try:
        cost = initialise(trainer)
    except NumericsError as error:
        return Outcome(seconds=time.perf_counter() - started, error=str(error))
    initialised = time.perf_counter()
    trainer.args.max_steps = steps = budget - math.ceil(cost * cost_share)
    raced = trainer.run_race(steps) if steps >= 1 else None
    if raced is not None and raced.race is not None:
        cost += raced.race.cost
        trainer.args.max_steps = steps = steps - raced.race.cost
    if steps < 1:
        found = f"the initialisation costs {budget - steps} training steps, the budget is {budget}"
        if cost_share < 1:
            return Outcome(cost_steps=cost, seconds=time.perf_counter() - started, error=found)
        fix = "Give more steps, or lower nio_report_batches, nio_batch_size or nio_race_steps"
        raise ConfigError(Problem("--steps", found, fix))
    losses = _Losses()
    trainer.add_callback(losses)
    measured = _add_diagnostics(trainer) if diagnostics else None
    trainer.train()
    metrics = trainer.evaluate()
    failed = not all(map(math.isfinite, losses.losses)) or not math.isfinite(metrics["eval_loss"])
    result = trainer.nio_result
    return Outcome(
        value=None if failed else recipe.metric.factor * metrics[recipe.metric.key],
        eval_loss=None if failed else metrics["eval_loss"],
        losses=tuple(map(_round, losses.losses)),
        grad_norms=tuple(map(_round, losses.grad_norms)),
        steps=steps,
        cost_steps=cost,
        cost_seconds=initialised - started,
        seconds=time.perf_counter() - started,
        error="the loss is not finite" if failed else None,
        initialisation=None if result is None else _summarise(result),
        diagnostics={} if measured is None else measured.values,
    )


class _Losses(TrainerCallback):
    """Records the loss and the gradient norm of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.grad_norms: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Record the log of a step, and end a training whose loss is not finite."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.grad_norms.append(float(logs.get("grad_norm", math.nan)))
            control.should_training_stop |= not math.isfinite(self.losses[-1])


def _add_diagnostics(trainer: RecipeTrainer) -> StepDiagnostics:
    batch = next(iter(trainer.get_eval_dataloader()))
    inputs = {key: value[:_DIAGNOSTIC_SAMPLES] for key, value in batch.items() if key != "labels"}
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    diagnostics = StepDiagnostics(cast(torch.nn.Module, trainer.model), inputs)
    trainer.add_callback(diagnostics)
    return diagnostics


def _summarise(result: NIOResult) -> dict[str, Any]:
    """Return the results of an initialisation that an outcome keeps."""
    return {
        "method": result.method,
        "status": result.status,
        "grad_cosine": [result.before.value, result.after.value],
        "grad_norm": [result.before.grad_norm, result.after.grad_norm],
        "loss": [result.before.loss, result.after.loss],
        "scales": [_round(tensor.omega) for tensor in result.tensors],
        "scales_by_group": {group.name: _round(group.omega) for group in result.groups},
        "cost": result.cost,
    }


def _round(value: float) -> float:
    return float(f"{value:.5g}")
