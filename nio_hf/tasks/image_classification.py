"""From a recipe to its trainer: data, image processor, model, augmentation."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any, cast

import datasets
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

# Not from the top, where some releases want torchvision for it.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from nio_hf.errors import ModelError, Problem, one_line
from nio_hf.image_training.trainer import ImageTrainer, ImageTrainingData, Samples
from nio_hf.recipe.loading import Recipe
from nio_hf.recipe.settings import PROCESSOR_KEYS, AugmentationSettings, ModelSettings
from nio_hf.tasks.task import DataFacts, Task, building, extras_of
from nio_hf.trainer.arguments import order_seed
from nio_hf.vision.augmentation import BatchAugmentation
from nio_hf.vision.datasets import ImageData, load_image_data
from nio_hf.vision.mixing import Mixing
from nio_hf.vision.processors import make_image_processor, pixel_format
from nio_hf.vision.rand_augment import RandAugment
from nio_hf.vision.samples import ImageSamples, ImageStream, Transform
from nio_hf.vision.stochastic_depth import CONFIG_FIELD, add_stochastic_depth
from nio_hf.vision.transforms import EvaluationTransform, TrainingTransform

logger = logging.getLogger(__name__)

_BYTE = 255


def build_trainer(recipe: Recipe) -> ImageTrainer:
    """Data, image processor, model and Trainer of a recipe.

    Raises:
        NIOError: for data or a model that cannot be loaded or do not go together, or an output directory that cannot
            be written.
    """
    args = recipe.training
    with building(recipe):
        # One process at a time prepares the data, the others find them prepared.
        with args.main_process_first(desc="preparing the data"):
            data = load_data(recipe)
        model, processor = load_model(recipe.model, data.class_names)
        augmentation = make_augmentation(recipe.augmentation, processor, len(data.class_names))
        return ImageTrainer(
            model=model,
            args=args,
            data=make_samples(recipe, data, processor, seeded=augmentation.is_random),
            augmentation=augmentation,
            nio_augment=recipe.augmentation.nio_augment,
            processing_class=processor,
            extras=extras_of(recipe, model),
        )


def _build_model(recipe: Recipe) -> PreTrainedModel:
    return build_model(recipe.model, ("a", "b"))


def _check_model(recipe: Recipe, model: PreTrainedModel) -> None:
    """Refuse a model without an image processor that can be augmented for."""
    pixel_format(_make_processor(recipe.model, model.config))


def _describe_data(recipe: Recipe) -> DataFacts:
    data = load_data(recipe)
    counted = data.is_split and hasattr(data.evaluation, "__len__")
    return DataFacts(len(data.class_names), len(data.evaluation) if counted else None)


def _describe_batch(trainer: Any) -> str:
    batch = next(iter(trainer.get_train_dataloader()))
    next(iter(trainer.get_eval_dataloader()))
    size = "x".join(map(str, batch["pixel_values"].shape[-2:]))
    train, evaluation = (_counted(samples) for samples in (trainer.data.train, trainer.data.evaluation))
    return (
        f"{trainer.model.config.num_labels} classes, {train} to train on, {evaluation} to evaluate on; "
        f"{len(batch['labels'])} images of {size} read"
    )


def _counted(samples: Samples) -> str:
    return "a stream of images" if isinstance(samples, ImageStream) else f"{len(samples):,} images"


def load_data(recipe: Recipe) -> ImageData:
    """The images of a recipe.

    Raises:
        DataError: see [`load_image_data`].
    """
    settings = dataclasses.asdict(recipe.data)
    renamed = {
        "name": settings.pop("dataset_name"),
        "config_name": settings.pop("dataset_config_name"),
        "revision": settings.pop("dataset_revision"),
    }
    settings.pop("skip_broken_images")
    return load_image_data(**renamed, **settings, seed=order_seed(recipe.training))


def make_samples(recipe: Recipe, data: ImageData, processor: BaseImageProcessor, *, seeded: bool) -> ImageTrainingData:
    """The samples that the trainer reads: cropped and flipped for training, as inference sees them for evaluation.

    Args:
        recipe: with the settings of data and augmentation.
        data: the stored images.
        processor: of the model.
        seeded: whether samples of training have seeds, to be augmented by on the device.
    """
    settings = recipe.augmentation
    training = TrainingTransform(
        processor,
        crop=settings.random_crop,
        scale=cast(tuple[float, float], tuple(settings.crop_scale)),
        aspect=cast(tuple[float, float], tuple(settings.crop_aspect)),
        padding=settings.crop_padding,
        flip=settings.horizontal_flip,
    )
    evaluation = EvaluationTransform(processor)

    def samples(rows: Any, transform: Transform, part: str) -> Samples:
        skip_broken = recipe.data.skip_broken_images
        common: dict[str, Any] = {"part": part, "skip_broken": skip_broken, "seeded": seeded and transform is training}
        if isinstance(rows, datasets.IterableDataset):
            classes = len(data.class_names)
            return ImageStream(rows, data.image_column, data.label_column, transform, classes=classes, **common)
        replace = part == "train"
        return ImageSamples(rows, data.image_column, data.label_column, transform, replace=replace, **common)

    train = samples(data.train, training, "train")
    clean = settings.nio_augment == "clean"
    nio = samples(data.train, evaluation, "train") if clean else train
    return ImageTrainingData(train, samples(data.evaluation, evaluation, "evaluation"), nio)


def make_augmentation(settings: AugmentationSettings, processor: BaseImageProcessor, classes: int) -> BatchAugmentation:
    """What is done to batches of training on the device."""
    pixels = pixel_format(processor)
    rand_augment = mixing = None
    if settings.randaugment_magnitude is not None:
        rand_augment = RandAugment(
            magnitude=settings.randaugment_magnitude,
            magnitude_std=settings.randaugment_magnitude_std,
            layers=settings.randaugment_layers,
            prob=settings.randaugment_prob,
            fill=tuple(_byte_near(mean) / _BYTE for mean in pixels.mean),
        )
    if settings.mixup_alpha > 0 or settings.cutmix_alpha > 0:
        mixing = Mixing(
            classes,
            mixup_alpha=settings.mixup_alpha,
            cutmix_alpha=settings.cutmix_alpha,
            prob=settings.mix_prob,
            switch_prob=settings.mix_switch_prob,
        )
    return BatchAugmentation(
        pixels,
        rand_augment=rand_augment,
        color_jitter=settings.color_jitter,
        random_erasing=settings.random_erasing,
        mixing=mixing,
    )


def _byte_near(mean: float) -> int:
    """The byte nearest to the mean of a channel, as published, but not the mean itself.

    That would be 0 once normalised, and so would be what a Swin makes of such patches in every layer: each of its
    normalisations would then multiply their gradient by 1 / sqrt(eps), about 300.
    """
    nearest = round(_BYTE * mean)
    return nearest + 1 if math.isclose(nearest, _BYTE * mean, abs_tol=1e-3) else nearest


def load_model(settings: ModelSettings, class_names: tuple[str, ...]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """The model of a recipe in fp32, built anew or loaded, and its image processor.

    Raises:
        ModelError: for one that cannot be loaded, or has another number of classes.
    """
    if settings.model_name_or_path is not None:
        return _load_pretrained(settings, settings.model_name_or_path, class_names)
    model = build_model(settings, class_names)
    return model, _make_processor(settings, model.config)


def _make_processor(settings: ModelSettings, config: PreTrainedConfig) -> BaseImageProcessor:
    return make_image_processor(config, **{key: getattr(settings, key) for key in PROCESSOR_KEYS})


def build_model(settings: ModelSettings, class_names: tuple[str, ...]) -> PreTrainedModel:
    """The model of a recipe, built anew in fp32.

    Raises:
        ModelError: for a configuration that no model can be built from.
    """
    try:
        config = make_config(settings, class_names)
        model: PreTrainedModel = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, LookupError, RuntimeError, ArithmeticError, ImportError) as error:
        fix = f"Correct it for {settings.model_type}"
        raise ModelError(Problem("model_config", f"no model can be built from it: {one_line(error)}", fix)) from error
    _add_stochastic_depth(model, settings.drop_path_rate)
    return model


def make_config(settings: ModelSettings, class_names: tuple[str, ...]) -> PreTrainedConfig:
    """The configuration of a model that is built anew."""
    names = dict(enumerate(class_names))
    config = AutoConfig.for_model(
        cast(str, settings.model_type),
        **settings.model_config,
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    # The auto classes iterate it to choose among the heads of an architecture with several, as DeiT has.
    config.architectures = config.architectures or []
    _set_drop_path_rate(config, settings.drop_path_rate)
    return config


def _load_pretrained(
    settings: ModelSettings, source: str, class_names: tuple[str, ...]
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    options = {"trust_remote_code": settings.trust_remote_code, "revision": settings.model_revision}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        _set_drop_path_rate(config, settings.drop_path_rate)
        model = AutoModelForImageClassification.from_pretrained(source, config=config, dtype=torch.float32, **options)
        processor = AutoImageProcessor.from_pretrained(source, backend="pil", **options)
    except (OSError, ValueError, SafetensorError) as error:
        fix = "Give a folder with an image classification checkpoint, or its name on the Hub"
        raise ModelError(
            Problem("model_name_or_path", f"{source!r} cannot be loaded: {one_line(error)}", fix)
        ) from error
    if model.config.num_labels != len(class_names):
        found = f"{source!r} has {model.config.num_labels} classes, the data set {len(class_names)}"
        fix = "Give a data set of as many classes, or initialise a model for this one: nio-hf init RECIPE"
        raise ModelError(Problem("model_name_or_path", found, fix))
    _name_classes(model.config, class_names, source)
    _add_stochastic_depth(model, settings.drop_path_rate)
    return model, processor


def _name_classes(config: PreTrainedConfig, class_names: tuple[str, ...], source: str) -> None:
    """Name the classes of a loaded model as the data set does, and say so where that changes what a name stands for."""
    names = dict(enumerate(class_names))
    former = {int(label): name for label, name in (config.id2label or {}).items()}
    if former != names:
        if not all(name == f"LABEL_{label}" for label, name in former.items()):
            logger.warning("The classes of %s have other names than those of the data set, which replace them.", source)
        config.id2label = names
        config.label2id = {name: label for label, name in names.items()}


def _add_stochastic_depth(model: PreTrainedModel, rate: float | None) -> None:
    """Add what the configuration of the model has no field for."""
    if rate is not None and not hasattr(model.config, CONFIG_FIELD):
        add_stochastic_depth(model, rate)


def _set_drop_path_rate(config: PreTrainedConfig, rate: float | None) -> None:
    if rate is not None and hasattr(config, CONFIG_FIELD):
        setattr(config, CONFIG_FIELD, rate)


TASK = Task(build_trainer, _build_model, _check_model, _describe_data, _describe_batch)
"""Image classification."""
