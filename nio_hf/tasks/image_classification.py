"""From a recipe of images to its Trainer: data, image processor, model, augmentation."""

from __future__ import annotations

import logging
from typing import Any, cast

import datasets
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

# Some releases want torchvision for the name at the top.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.deit.modeling_deit import DeiTLayer
from transformers.models.swin.modeling_swin import SwinDropPath
from transformers.models.vit.modeling_vit import ViTLayer

from nio_hf.errors import ModelError, Problem
from nio_hf.recipe.loading import Recipe
from nio_hf.recipe.settings import PROCESSOR_KEYS, ModelSettings
from nio_hf.tasks.image_trainer import ImageTrainer, ImageTrainingData, Samples
from nio_hf.tasks.task import DataFacts, Task, name_broken_checkpoint, name_broken_config, prepare_building
from nio_hf.trainer.arguments import order_seed
from nio_hf.vision.augmentation import BatchAugmentation
from nio_hf.vision.datasets import ImageData, load_image_data
from nio_hf.vision.processors import EvaluationTransform, TrainingTransform, make_image_processor, pixel_format
from nio_hf.vision.samples import ImageSamples, ImageStream, Transform

logger = logging.getLogger(__name__)

_DEPTH = "drop_path_rate"


def build_trainer(recipe: Recipe) -> ImageTrainer:
    """Build the Trainer of a recipe with data, processor and model. Errors are as in [`nio_hf.tasks.build_trainer`]."""
    with prepare_building(recipe):
        # One process prepares the data, and the others find them in the cache.
        with recipe.training.main_process_first(desc="preparing the data"):
            data = load_image_data(recipe.data, order_seed(recipe.training))
        model, processor = load_model(recipe.model, data.class_names)
        augmentation = BatchAugmentation(pixel_format(processor), recipe.augmentation, len(data.class_names))
        return ImageTrainer(
            recipe=recipe,
            model=model,
            data=_make_samples(recipe, data, processor, seeded=augmentation.is_random),
            augmentation=augmentation,
            processing_class=processor,
        )


def _make_samples(recipe: Recipe, data: ImageData, processor: BaseImageProcessor, *, seeded: bool) -> ImageTrainingData:
    """Samples: cropped and flipped for training, as inference sees them for evaluation, by `nio_augment` for NIO."""
    training, evaluation = TrainingTransform(processor, recipe.augmentation), EvaluationTransform(processor)

    def samples(rows: Any, transform: Transform, part: str) -> Samples:
        skip_broken = recipe.data.skip_broken_images
        options: dict[str, Any] = {"part": part, "skip_broken": skip_broken, "seeded": seeded and transform is training}
        if isinstance(rows, datasets.IterableDataset):
            return ImageStream(rows, transform, data.columns, classes=len(data.class_names), **options)
        return ImageSamples(rows, transform, data.columns, **options)

    train = samples(data.train, training, "train")
    nio = samples(data.train, evaluation, "train") if recipe.augmentation.nio_augment == "clean" else train
    return ImageTrainingData(train, samples(data.evaluation, evaluation, "evaluation"), nio)


def load_model(settings: ModelSettings, class_names: tuple[str, ...]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Build or load the model of a recipe in fp32, with its image processor.

    Raises:
        ModelError: Model that cannot be built or loaded, or has another number of classes.
    """
    source = settings.model_name_or_path
    if source is None:
        model = build_model(settings, class_names)
        return model, _make_processor(settings, model.config)
    with name_broken_checkpoint(settings, "an image classification checkpoint") as options:
        config = AutoConfig.from_pretrained(source, **options)
        _set_depth(config, settings.drop_path_rate)
        model = AutoModelForImageClassification.from_pretrained(source, config=config, dtype=torch.float32, **options)
        processor = AutoImageProcessor.from_pretrained(source, backend="pil", **options)
    if model.config.num_labels != len(class_names):
        found = f"{source!r} has {model.config.num_labels} classes, the data set {len(class_names)}"
        fix = "Give a data set of as many classes, or initialise a model for this one: nio-hf init RECIPE"
        raise ModelError(Problem("model_name_or_path", found, fix))
    names = dict(enumerate(class_names))
    former = {int(label): name for label, name in (model.config.id2label or {}).items()}
    if former != names:
        if any(name != f"LABEL_{label}" for label, name in former.items()):
            logger.warning("The classes of %s have other names than the data set, whose names replace them.", source)
        model.config.id2label, model.config.label2id = names, {name: label for label, name in names.items()}
    add_stochastic_depth(model, settings.drop_path_rate)
    return model, processor


def _make_processor(settings: ModelSettings, config: PreTrainedConfig) -> BaseImageProcessor:
    return make_image_processor(config, **{key: getattr(settings, key) for key in PROCESSOR_KEYS})


def build_model(settings: ModelSettings, class_names: tuple[str, ...]) -> PreTrainedModel:
    """Build the model of a recipe in fp32.

    Raises:
        ModelError: Configuration that no model can be built from.
    """
    names = dict(enumerate(class_names))
    labels = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    with name_broken_config(settings):
        config = AutoConfig.for_model(cast(str, settings.model_type), **settings.model_config, **labels)
        # The auto classes iterate it to choose among several heads of an architecture, as of DeiT.
        config.architectures = config.architectures or []
        _set_depth(config, settings.drop_path_rate)
        model: PreTrainedModel = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
        add_stochastic_depth(model, settings.drop_path_rate)
    return model


def _set_depth(config: PreTrainedConfig, rate: float | None) -> None:
    if rate is not None and hasattr(config, _DEPTH):
        setattr(config, _DEPTH, rate)


def add_stochastic_depth(model: PreTrainedModel, rate: float | None) -> None:
    """Put stochastic depth (arXiv 1603.09382) behind both residual branches of each layer of a ViT or DeiT.

    The probability rises linearly with depth from 0 at the first layer to `rate` at the last, as published. A model
    whose configuration has a `drop_path_rate` is left alone, and so is every model for a rate of None.

    Raises:
        ModelError: Model of another architecture.
    """
    if rate is None or hasattr(model.config, _DEPTH):
        return
    layers = [module for module in model.modules() if isinstance(module, ViTLayer | DeiTLayer)]
    if not layers:
        found = f"{type(model).__name__} has no layers of a ViT or DeiT for stochastic depth"
        raise ModelError(Problem(_DEPTH, found, "Leave it out, or choose an architecture that has it"))
    for depth, layer in enumerate(layers):
        branch_end = nn.Sequential(layer.dropout, SwinDropPath(rate * depth / max(len(layers) - 1, 1)))
        layer.add_module("dropout", branch_end.train(layer.training))


def _check_model(recipe: Recipe, model: PreTrainedModel) -> None:
    """Refuse a model whose image processor leaves no place for augmentation."""
    pixel_format(_make_processor(recipe.model, model.config))


def _describe_data(recipe: Recipe) -> DataFacts:
    data = load_image_data(recipe.data, order_seed(recipe.training))
    counted = data.is_split and hasattr(data.evaluation, "__len__")
    return DataFacts(len(data.class_names), len(data.evaluation) if counted else None)


def _describe_batch(trainer: ImageTrainer) -> str:
    batch = next(iter(trainer.get_train_dataloader()))
    next(iter(trainer.get_eval_dataloader()))
    size = "x".join(map(str, batch["pixel_values"].shape[-2:]))
    train, evaluation = (
        "a stream of images" if isinstance(samples, ImageStream) else f"{len(samples):,} images"
        for samples in (trainer.data.train, trainer.data.evaluation)
    )
    described = f"{train} to train on, {evaluation} to evaluate on; {len(batch['labels'])} images of {size} read"
    return f"{cast(Any, trainer.model).config.num_labels} classes, {described}"


TASK = Task(
    build_trainer, lambda recipe: build_model(recipe.model, ("a", "b")), _check_model, _describe_data, _describe_batch
)
"""Image classification."""
