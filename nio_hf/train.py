"""Train a recipe: `python -m nio_hf.train RECIPE`, or under `accelerate launch -m nio_hf.train RECIPE`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    set_seed,
)

from nio_hf import report
from nio_hf.console import print_run, run_command
from nio_hf.core import NIOResult
from nio_hf.errors import ModelError, Problem, one_line
from nio_hf.recipe.catalog import DEFAULT_RECIPE, split_arguments
from nio_hf.recipe.loading import Recipe, load_recipe
from nio_hf.recipe.settings import DataSettings, ModelSettings
from nio_hf.training import NIOTrainer
from nio_hf.training.checkpoints import ensure_writable
from nio_hf.vision.datasets import ImageData, load_image_data
from nio_hf.vision.transforms import ImageTransform, make_image_processor

PLOTS_DIR_NAME = "plots"


@dataclasses.dataclass(frozen=True)
class RunReport:
    """What a run achieved and wrote.

    Attributes:
        title: names the run.
        rows: the summary table, (quantity, before, after).
        result: of NIO; None where it did not run.
        metrics: of the Trainer.
        written: {what: path} of all that was written.
        is_main_process: whether this process is the one that reports.
    """

    title: str
    rows: list[report.SummaryRow]
    result: NIOResult | None
    metrics: dict[str, float]
    written: dict[str, Path]
    is_main_process: bool


def train(recipe: Recipe) -> RunReport:
    """Initialise, train, evaluate, save, and draw what happened.

    Raises:
        NIOError: for data or a model that cannot be loaded or do not go together; see also [`NIOTrainer`].
    """
    trainer = build_trainer(recipe)
    outcome = trainer.train(resume_from_checkpoint=recipe.training.resume_from_checkpoint)
    metrics = {**outcome.metrics, **trainer.evaluate()}
    trainer.save_model()
    trainer.save_metrics("all", metrics)
    trainer.save_state()
    return _report(trainer, recipe, metrics)


def initialise(recipe: Recipe) -> RunReport:
    """Initialise and save, without training.

    Raises:
        NIOError: as [`train`].
    """
    trainer = build_trainer(recipe)
    trainer.run_nio()
    return _report(trainer, recipe, {})


def build_trainer(recipe: Recipe) -> NIOTrainer:
    """Data, image processor, model and Trainer of a recipe.

    Raises:
        NIOError: for data or a model that cannot be loaded or do not go together, or an output directory that cannot
            be written.
    """
    from nio_hf.vision.metrics import classification_metrics, predicted_classes

    args = recipe.training
    ensure_writable(Path(cast(str, args.output_dir)))
    set_seed(args.seed)
    data = _load_data(recipe.data, args.data_seed if args.data_seed is not None else args.seed)
    model, processor = _load_model(recipe.model, data)
    transform = ImageTransform(processor, data.image_column, data.label_column)
    return NIOTrainer(
        model=model,
        args=args,
        train_dataset=data.train.with_transform(transform),
        eval_dataset=data.evaluation.with_transform(transform),
        processing_class=processor,
        compute_metrics=classification_metrics,
        preprocess_logits_for_metrics=predicted_classes,
    )


def run_recipe(action: Callable[[Recipe], RunReport], arguments: Sequence[str]) -> int:
    """Do something with the recipe of a command line and show the report; returns the exit status."""

    def command() -> None:
        run = action(load_recipe(*split_arguments(arguments)))
        if run.is_main_process:
            print_run(run.title, run.rows, run.result.message if run.result else None, run.written)

    return run_command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Train the recipe named first, with the overrides behind it; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(f"usage: python -m nio_hf.train [RECIPE] [--key value ...]\n\n{__doc__}\n")
        sys.stdout.write(f"Without RECIPE it is {DEFAULT_RECIPE}.\n")
        return 0
    return run_recipe(train, arguments)


def _load_data(settings: DataSettings, seed: int) -> ImageData:
    return load_image_data(
        settings.dataset_name,
        config_name=settings.dataset_config_name,
        train_split=settings.train_split,
        eval_split=settings.eval_split,
        eval_fraction=settings.eval_fraction,
        image_column=settings.image_column,
        label_column=settings.label_column,
        seed=seed,
    )


def _load_model(settings: ModelSettings, data: ImageData) -> tuple[PreTrainedModel, BaseImageProcessor]:
    if settings.model_name_or_path is None:
        names = dict(enumerate(data.class_names))
        config = AutoConfig.for_model(
            cast(str, settings.model_type),
            **settings.model_config,
            id2label=names,
            label2id={name: index for index, name in names.items()},
        )
        model = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
        return model, make_image_processor(config)
    source = settings.model_name_or_path
    try:
        model = AutoModelForImageClassification.from_pretrained(source, dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    except (OSError, ValueError) as error:
        fix = "Give a folder with an image classification checkpoint, or its name on the Hub"
        raise ModelError(
            Problem("model_name_or_path", f"{source!r} cannot be loaded: {one_line(error)}", fix)
        ) from error
    if model.config.num_labels != len(data.class_names):
        found = f"{source!r} has {model.config.num_labels} classes, the data set {len(data.class_names)}"
        raise ModelError(Problem("model_name_or_path", found, "Give a model or a data set of as many classes"))
    return model, processor


def _report(trainer: NIOTrainer, recipe: Recipe, metrics: dict[str, float]) -> RunReport:
    """Collect, and on the main process draw, what a run leaves behind."""
    output_dir = Path(cast(str, recipe.training.output_dir))
    result = trainer.nio_result
    rows = report.summary_rows(result, metrics)
    written: dict[str, Path] = {}
    if result is not None and recipe.training.nio_save_init:
        written["Initialised checkpoint"] = trainer.nio_init_dir
    if metrics:
        written["Trained model"] = output_dir
    if trainer.is_world_process_zero():
        plots = output_dir / PLOTS_DIR_NAME
        if result is not None:
            written["Plot of the scales"] = report.plot_scales(result, plots / "nio_scales.png")
            written["Plot of NIO by iteration"] = report.plot_history(result, plots / "nio_history.png")
        if metrics:
            history = trainer.state.log_history
            written["Plot of the training"] = report.plot_training(history, plots / "training.png")
    return RunReport(
        f"{recipe.path.parent.name} / {recipe.path.stem}",
        rows,
        result,
        metrics,
        written,
        trainer.is_world_process_zero(),
    )


if __name__ == "__main__":
    sys.exit(main())
