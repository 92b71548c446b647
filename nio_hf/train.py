"""Train a recipe: `python -m nio_hf.train RECIPE`, or under `accelerate launch -m nio_hf.train RECIPE`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from nio_hf.catalog import DEFAULT_RECIPE, recipe_name, split_arguments
from nio_hf.console import FAILURE, exit_status, print_results
from nio_hf.core import NIOResult
from nio_hf.durable.preemption import preempted_at_once
from nio_hf.durable.trainer import AUTO
from nio_hf.errors import ConfigError, HubError, NIOError, NumericsError, Problem
from nio_hf.files import output_errors
from nio_hf.hub.run_folder import SAMPLE_NAME, read_run
from nio_hf.hub.trainer import PLOTS_DIR_NAME
from nio_hf.recipe.loading import Recipe, load_recipe
from nio_hf.report import SummaryRow, draw_run, summary_rows
from nio_hf.report.run import Run
from nio_hf.tasks import build_trainer
from nio_hf.tasks.trainer import RecipeTrainer

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class RunReport:
    """Results and files of a run.

    Attributes:
        title: Name of the run.
        rows: Rows (quantity, before, after) of the summary table.
        result: Result of the NIO run that the model started from; None without one.
        metrics: Metrics of the Trainer.
        files: {description: path or address} of everything that was written.
        is_main_process: Whether this process reports.
        failure: Error that ended the run or its push; None for a success.
    """

    title: str
    rows: list[SummaryRow]
    result: NIOResult | None
    metrics: dict[str, float]
    files: dict[str, Path | str]
    is_main_process: bool
    failure: NIOError | None = None


def train(recipe: Recipe) -> RunReport:
    """Initialise and train a model, evaluate and save it, and draw the plots of the run.

    Raises:
        NIOError: Data or a model that cannot be loaded or do not fit together, and the errors of [`NIOTrainer`].
        Preempted: A SIGTERM, after a save.
    """
    trainer = build_trainer(recipe)
    outcome = trainer.train(resume_from_checkpoint=recipe.training.resume_from_checkpoint)
    output_dir = Path(cast(str, recipe.training.output_dir))
    with output_errors(output_dir):
        trainer.save_model(_internal_call=True)
        trainer.save_state()
    with _stopping_at_once(recipe):
        metrics = {**outcome.metrics, **trainer.evaluate()}
        # A training that was resumed counts the seconds of all its sessions.
        metrics["train_runtime"] = trainer.training_seconds
        metrics |= trainer.evaluate_average(output_dir / "ema")
        sample = trainer.sample() if math.isfinite(metrics["eval_loss"]) else None
    with output_errors(output_dir):
        trainer.save_metrics("all", metrics)
        trainer.save_state()
        if trainer.args.should_save:
            (output_dir / SAMPLE_NAME).unlink(missing_ok=True)
            if sample is not None:
                (output_dir / SAMPLE_NAME).write_text(sample, encoding="utf-8")
        run = _report(trainer, recipe, metrics)
    with _stopping_at_once(recipe):
        _push(run, trainer)
    return run


def _stopping_at_once(recipe: Recipe) -> contextlib.AbstractContextManager[None]:
    """Let SIGTERM end the work after the training at once: the trained model is saved already."""
    if not recipe.training.enable_jit_checkpoint:
        return contextlib.nullcontext()
    return preempted_at_once("SIGTERM: stopped after the training; the trained model is saved.")


def initialise(recipe: Recipe) -> RunReport:
    """Initialise a model and save it without training.

    Raises:
        NIOError: As in [`train`].
    """
    if recipe.training.push_to_hub and not recipe.training.nio_save_init:
        fix = "Leave out nio_save_init: what is pushed is the initialised checkpoint that it saves"
        raise ConfigError(Problem("push_to_hub", "with nio_save_init: false", fix))
    trainer = build_trainer(recipe)
    trainer.run_nio(resume=recipe.training.resume_from_checkpoint == AUTO)
    run = _report(trainer, recipe, {})
    _push(run, trainer)
    return run


def _report(trainer: RecipeTrainer, recipe: Recipe, metrics: dict[str, float]) -> RunReport:
    """Collect the results of a run, and draw its plots on the main process."""
    output_dir, is_main_process = Path(cast(str, recipe.training.output_dir)), trainer.is_world_process_zero()
    result, files = trainer.nio_result, dict[str, Path | str]()
    if result is not None and recipe.training.nio_save_init:
        files["Initialised checkpoint"] = trainer.nio_init_dir
    if metrics:
        files["Trained model"] = output_dir
    if is_main_process:
        run = read_run(output_dir) if metrics else Run(output_dir.name, trainer.run_facts(), result)
        # A training that was resumed, or loaded an initialised checkpoint, has not run NIO itself.
        result = result or run.result
        files |= draw_run(run, output_dir / PLOTS_DIR_NAME)
    rows = [*summary_rows(result, metrics), *trainer.summary_rows()]
    failure = None
    if not all(math.isfinite(metrics.get(name, 0.0)) for name in ("train_loss", "eval_loss")):
        failure = NumericsError(Problem("the training", "diverged: its loss is not finite", "Lower learning_rate"))
    return RunReport(recipe_name(recipe.path), rows, result, metrics, files, is_main_process, failure)


def _push(run: RunReport, trainer: RecipeTrainer) -> None:
    """Push the model of a run that did not fail, if the recipe asks for it; the model is saved before."""
    if run.failure is None and trainer.args.push_to_hub:
        try:
            commit = trainer.push_to_hub()
            if commit is not None:
                run.files["On the Hub"] = commit.repo_url
        except HubError as error:
            run.failure = error
    elif run.failure is None and trainer.args.hub_private_repo and run.is_main_process:
        logger.warning("Nothing is pushed: --private needs --push_to_hub USER/NAME beside it.")


def run_recipe(action: Callable[[Recipe], RunReport], arguments: Sequence[str]) -> int:
    """Carry out an action with the recipe of a command line, print its report, and return the exit status."""

    def command() -> int:
        run = action(load_recipe(*split_arguments(arguments)))
        if run.is_main_process:
            sentences = [f"Initialisation: {run.result.message}"] if run.result else []
            print_results(run.title, {"": (("", "before NIO", "after"), run.rows)}, sentences, run.files)
            if run.failure is not None:
                raise run.failure
        return FAILURE if run.failure is not None else 0

    return exit_status(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Train the recipe that stands first, with the overrides behind it, and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(f"usage: python -m nio_hf.train [RECIPE] [--key value ...]\n\n{__doc__}\n")
        sys.stdout.write(f"Without RECIPE it is {DEFAULT_RECIPE}.\n")
        return 0
    return run_recipe(train, arguments)


if __name__ == "__main__":
    sys.exit(main())
