"""One trial, in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainerCallback

from nio_hf.core.result import NIOResult
from nio_hf.errors import ConfigError, NIOError, NumericsError, Problem, RecipeError
from nio_hf.files import write_atomically
from nio_hf.recipe.loading import load_recipe
from nio_hf.recipe.strict_yaml import with_values
from nio_hf.tasks import build_trainer
from nio_hf.tasks.trainer import RecipeTrainer
from nio_hf.trials.costs import is_free
from nio_hf.trials.diagnostics import StepDiagnostics
from nio_hf.trials.operations import OperationCount
from nio_hf.trials.results import Outcome

_LOOKED_AT = 64
"""Samples of the batch whose output is looked at."""
_FOLDER = ".nio-trial-"
"""What the names of temporary folders begin with."""


@dataclasses.dataclass(frozen=True)
class Order:
    """What a process is to do.

    Attributes:
        recipe: file or name of the recipe.
        overrides: settings as command line options, but for the folder to train in, which is a temporary one.
        outcome_file: to write the outcome to, as JSON.
        log_file: for what it prints.
        threads: of torch; None for its own choice.
        diagnostics: whether to look at the first steps.
        cost_share: part of the cost of the initialisation that is paid from the budget.
    """

    recipe: str
    overrides: tuple[str, ...]
    outcome_file: Path
    log_file: Path
    threads: int | None
    diagnostics: bool
    cost_share: float = 1.0


def carry_out(order: Order) -> None:
    """Do a run and write its outcome, or what is wrong with it; what it prints goes to its log.

    It ends with the process that started it.
    """
    end_with_parent()
    with order.log_file.open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    logging.getLogger("nio_hf").setLevel(logging.INFO)
    if order.threads is not None:
        torch.set_num_threads(order.threads)
    with tempfile.TemporaryDirectory(prefix=_FOLDER, dir=order.outcome_file.parent) as folder:
        overrides = with_values(order.overrides, {"output_dir": folder})
        try:
            written = dataclasses.asdict(train_once(order.recipe, overrides, order.diagnostics, order.cost_share))
        except NIOError as error:
            if not error.problems:
                raise
            is_usage = isinstance(error, ConfigError | RecipeError)
            written = {"problems": [dataclasses.astuple(problem) for problem in error.problems], "is_usage": is_usage}
    write_atomically(order.outcome_file, json.dumps(written) + "\n")


def remove_folders(directory: Path) -> None:
    """Remove the folders of trainings that were ended in the middle."""
    for folder in directory.glob(f"{_FOLDER}*"):
        shutil.rmtree(folder, ignore_errors=True)


def end_with_parent() -> None:
    """Let this process end as soon as the one that started it has ended, however that came about."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def train_once(recipe_name: str, overrides: Sequence[str], diagnostics: bool, cost_share: float = 1.0) -> Outcome:
    """Initialise, train for what is left of the budget, and evaluate.

    The budget is `max_steps` training steps. The initialisation, or `cost_share` of it, is paid from it: its floating
    point operations are counted and divided by those of a training step. So are the steps of a race, which has the
    schedule of a training that is longer by as many.

    Raises:
        ConfigError: for an initialisation that costs the whole budget; where a share of it is paid, the run failed.
        NIOError: as in [`build_trainer`] and [`NIOTrainer`].
    """
    started = time.perf_counter()
    recipe = load_recipe(recipe_name, overrides)
    trainer = build_trainer(recipe)
    budget = trainer.args.max_steps
    try:
        cost = _initialise(trainer)
    except NumericsError as error:
        return Outcome.failure(str(error), time.perf_counter() - started)
    initialised = time.perf_counter()
    steps = budget - math.ceil(cost * cost_share)
    if steps < 1:
        found = f"the initialisation costs {cost * cost_share:.0f} training steps, the budget is {budget}"
        if cost_share < 1:
            return Outcome.failure(found, time.perf_counter() - started, cost)
        fix = "Give more steps, or lower nio_search_batches, nio_report_batches or nio_batch_size"
        raise ConfigError(Problem("--steps", found, fix))
    trainer.args.max_steps = steps
    raced = trainer.run_race(steps)
    if raced is not None and raced.race is not None:
        cost += raced.race.cost
        steps -= raced.race.cost
        if steps < 1:
            found = f"initialisation and race take {cost:.0f} training steps, the budget is {budget}"
            raise ConfigError(Problem("--steps", found, "Give more steps, or lower nio_race_steps"))
        trainer.args.max_steps = steps
    losses = _Losses()
    trainer.add_callback(losses)
    looked_at = _diagnostics(trainer) if diagnostics else None
    trainer.train()
    metrics = trainer.evaluate()
    failed = not all(map(math.isfinite, losses.losses)) or not math.isfinite(metrics["eval_loss"])
    result = trainer.nio_result
    return Outcome(
        value=None if failed else recipe.metric.factor * metrics[recipe.metric.key],
        eval_loss=None if failed else metrics["eval_loss"],
        losses=tuple(map(_rounded, losses.losses)),
        grad_norms=tuple(map(_rounded, losses.grad_norms)),
        steps=steps,
        cost_steps=cost,
        cost_seconds=initialised - started,
        seconds=time.perf_counter() - started,
        error="the loss is not finite" if failed else None,
        initialisation=None if result is None else summary(result),
        diagnostics={} if looked_at is None else looked_at.values,
    )


def _initialise(trainer: RecipeTrainer) -> float:
    """Initialise the model, and return what that and the seeding of the optimizer cost, in training steps.

    A method that looks at no data costs nothing.
    """
    args = trainer.args
    if not args.nio and args.nio_seed_optimizer is None:
        return 0.0
    with OperationCount() as one_pass:
        trainer.squared_gradients(batches=1)
    per_sample = one_pass.operations / args.nio_batch_size
    samples_of_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    operations = 0.0
    if args.nio:
        with OperationCount() as initialisation:
            trainer.run_nio()
        if not is_free(args):
            operations += initialisation.operations
    if args.nio_seed_optimizer is not None:
        operations += per_sample * args.nio_batch_size * args.nio_report_batches
    return float(operations / (per_sample * samples_of_step))


class _Losses(TrainerCallback):
    """Keeps the loss and the gradient norm of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.grad_norms: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep what is logged of a step; a training whose loss is not finite ends."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.grad_norms.append(float(logs.get("grad_norm", math.nan)))
            control.should_training_stop |= not math.isfinite(self.losses[-1])


def _diagnostics(trainer: RecipeTrainer) -> StepDiagnostics:
    batch = next(iter(trainer.get_eval_dataloader()))
    inputs = {key: value[:_LOOKED_AT] for key, value in batch.items() if key != "labels"}
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    looked_at = StepDiagnostics(cast(torch.nn.Module, trainer.model), inputs)
    trainer.add_callback(looked_at)
    return looked_at


def summary(result: NIOResult) -> dict[str, Any]:
    """What is kept of an initialisation."""
    return {
        "method": result.method,
        "status": result.status,
        "grad_cosine": [result.before.value, result.after.value],
        "grad_norm": [result.before.grad_norm, result.after.grad_norm],
        "loss": [result.before.loss, result.after.loss],
        "scales": [_rounded(tensor.omega) for tensor in result.tensors],
        "scales_by_group": {group.name: _rounded(group.omega) for group in result.groups},
        "cost": result.cost,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
