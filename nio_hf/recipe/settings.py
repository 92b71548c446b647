"""Settings of a recipe with their ranges: model, data, text, augmentation and optimisation."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from annotated_types import Interval
from pydantic import AfterValidator

OptimizerName = Literal["radam", "muon"]
TaskName = Literal["image-classification", "causal-lm", "masked-lm"]

Count = Annotated[int, Interval(ge=1)]
AtLeastTwo = Annotated[int, Interval(ge=2)]
NotNegative = Annotated[float, Interval(ge=0)]
Positive = Annotated[float, Interval(gt=0)]
Share = Annotated[float, Interval(ge=0, le=1)]
ShareBelowOne = Annotated[float, Interval(ge=0, lt=1)]
PositiveShare = Annotated[float, Interval(gt=0, le=1)]
PartOfWhole = Annotated[float, Interval(gt=0, lt=1)]
Magnitude = Annotated[float, Interval(ge=0, le=10)]
Seed = Annotated[int, Interval(ge=0, lt=2**32)]


def _check_channels(values: list[float]) -> list[float]:
    if len(values) != 3:
        raise ValueError("Give three numbers, one for each of red, green and blue")
    return values


def _check_rising(values: list[float]) -> list[float]:
    if len(values) != 2 or values[0] > values[1]:
        raise ValueError("Give two rising numbers")
    return values


Channels = AfterValidator(_check_channels)
Rising = AfterValidator(_check_rising)


@dataclasses.dataclass
class ModelSettings:
    """Settings of the model: built anew from its configuration, or loaded with its image processor or tokeniser.

    Attributes:
        task: Task that the model learns; None for an architecture that can learn one task only.
        model_type: Name of a transformers architecture that can learn the task, e.g. "vit", "swin", "gpt2" or "bert".
        model_config: Fields of the configuration that differ from the defaults, e.g. `{hidden_size: 192}`.
        model_name_or_path: Checkpoint to start from instead, e.g. one that `nio-hf init` wrote.
        model_revision: Branch, tag or commit of a checkpoint on the Hub.
        trust_remote_code: Whether Python code of the checkpoint may run: only where you trust its author.
        image_size: Side of the images in pixels, for architectures whose configuration has none (ResNet).
        image_mean: Mean of each channel over pixels in [0, 1]; None for the published one of the architecture.
        image_std: Standard deviation of each channel, likewise.
        interpolation: Method of resizing; None for the published one.
        crop_ratio: Part of the shorter side that evaluation keeps: images are resized to size / crop_ratio, then
            cropped at the centre. None for the way of the published image processor.
        drop_path_rate: Stochastic depth of the last layer, rising linearly from 0 at the first; None for the value of
            the configuration.
    """

    task: TaskName | None = None
    model_type: str | None = None
    model_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    model_name_or_path: str | None = None
    model_revision: str | None = None
    trust_remote_code: bool = False
    image_size: Count | None = None
    image_mean: Annotated[list[float], Channels] | None = None
    image_std: Annotated[list[Positive], Channels] | None = None
    interpolation: Literal["bilinear", "bicubic"] | None = None
    crop_ratio: PositiveShare | None = None
    drop_path_rate: ShareBelowOne | None = None


PROCESSOR_KEYS = ("image_size", "image_mean", "image_std", "interpolation", "crop_ratio")
"""Settings of the image processor. A loaded model brings its own."""


@dataclasses.dataclass
class DataSettings:
    """Settings of the data set of images or documents.

    Attributes:
        dataset_name: Name that [`datasets.load_dataset`] takes: a data set on the Hub, a local folder, or a format
            ("imagefolder", "text", "json", "parquet", "webdataset") with `data_dir` or `data_files`. The default is
            "digits" for images, and "stdlib", the source of Python's standard library, for text.
        dataset_config_name: Configuration of the data set.
        dataset_revision: Revision of a data set on the Hub.
        data_dir: Folder in the data set, or of the files.
        data_files: Files as a pattern, a list of patterns, or a mapping from splits.
        streaming: Whether data are read while training, without a download of all of them; needs `max_steps`.
        shuffle_buffer_size: Number of samples of a stream that are shuffled at a time.
        train_split: Split to train on.
        eval_split: Split to evaluate on; None for the validation split, or without one a part of the training split.
        eval_fraction: Share of the training split that is set aside as that part.
        eval_from_train: Whether to evaluate on such a part whatever splits there are, to choose settings by it.
        image_column: Column of images; None for the only one.
        label_column: Column of class labels; None for the only one.
        num_classes: Number of classes, for a stream of integer labels whose classes have no names.
        max_train_samples: Largest number of samples to train on.
        max_eval_samples: Largest number of samples to evaluate on.
        skip_broken_images: Whether unreadable images are skipped and counted instead of ending the run.
    """

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, Any] | None = None
    streaming: bool = False
    shuffle_buffer_size: Count = 1000
    train_split: str = "train"
    eval_split: str | None = None
    eval_fraction: PartOfWhole = 0.2
    eval_from_train: bool = False
    image_column: str | None = None
    label_column: str | None = None
    num_classes: AtLeastTwo | None = None
    max_train_samples: Count | None = None
    max_eval_samples: Count | None = None
    skip_broken_images: bool = False


@dataclasses.dataclass
class TextSettings:
    """Settings by which documents become blocks of tokens.

    Attributes:
        tokenizer: "bytes", which needs no download, or a tokeniser on the Hub or in a folder; None for the tokeniser of
            a loaded model, else "bytes".
        text_column: Column of texts; None for the only one.
        block_size: Number of tokens of a block; None for the positions of the model, 1024 at most.
        mlm_probability: Share of the tokens that a masked model has to restore.
        num_proc: Number of processes that turn text into tokens; None for this process alone.
        sample_prompt: Prompt that the trained model continues in the report; None for no sample.
    """

    tokenizer: str | None = None
    text_column: str | None = None
    block_size: AtLeastTwo | None = None
    mlm_probability: PartOfWhole = 0.15
    num_proc: Count | None = None
    sample_prompt: str | None = "def "


@dataclasses.dataclass
class AugmentationSettings:
    """Settings by which training changes images. Evaluation sees images as the image processor makes them.

    Attributes:
        random_crop: "resized" (a random part, resized), "padded" (zeros around a small image, a random window), "none".
        crop_scale: Range of the area of the part for "resized", as a share of the image.
        crop_aspect: Range of the width / height of the part for "resized".
        crop_padding: Number of pixels around the image for "padded".
        horizontal_flip: Probability of a flip.
        randaugment_magnitude: Magnitude M of RandAugment out of 10; None for no RandAugment.
        randaugment_magnitude_std: Standard deviation of M.
        randaugment_layers: Number N of operations for each image.
        randaugment_prob: Probability of each operation.
        color_jitter: Strength of random brightness, contrast and saturation.
        random_erasing: Probability of filling a rectangle with noise.
        mixup_alpha: Parameter of the Beta distribution that MixUp draws from; 0 for no MixUp.
        cutmix_alpha: Parameter of the Beta distribution that CutMix draws from; 0 for no CutMix.
        mix_prob: Probability of mixing a batch.
        mix_switch_prob: Probability of CutMix where both are on.
        repeated_augmentation: Number of draws of each image in an epoch; an epoch keeps its length.
        nio_augment: Images of NIO: "clean" as in evaluation, "augmented" as in training but not mixed, "mixed" with
            mixing and label smoothing.
    """

    random_crop: Literal["none", "resized", "padded"] = "none"
    crop_scale: Annotated[list[PositiveShare], Rising] = dataclasses.field(default_factory=lambda: [0.08, 1.0])
    crop_aspect: Annotated[list[Positive], Rising] = dataclasses.field(default_factory=lambda: [3 / 4, 4 / 3])
    crop_padding: Count = 4
    horizontal_flip: Share = 0.0
    randaugment_magnitude: Magnitude | None = None
    randaugment_magnitude_std: NotNegative = 0.0
    randaugment_layers: Count = 2
    randaugment_prob: Share = 0.5
    color_jitter: Share = 0.0
    random_erasing: Share = 0.0
    mixup_alpha: NotNegative = 0.0
    cutmix_alpha: NotNegative = 0.0
    mix_prob: Share = 1.0
    mix_switch_prob: Share = 0.5
    repeated_augmentation: Count = 1
    nio_augment: Literal["clean", "augmented", "mixed"] = "augmented"


@dataclasses.dataclass
class OptimizationSettings:
    """Settings of the optimisation that TrainingArguments lack.

    Attributes:
        global_batch_size: Number of samples of an optimiser step over all devices, from which
            `gradient_accumulation_steps` follows.
        no_weight_decay: Parameters without weight decay: "vectors" for all of fewer than two dimensions (biases,
            normalisation), others by the last part of their name. None for Trainer's choice.
        optimizer: Optimiser "radam" or "muon"; None for the optimiser that `optim` names.
        ema_decay: Decay of an exponential moving average of the weights, which is evaluated and saved at the end; None
            for no average.
    """

    global_batch_size: Count | None = None
    no_weight_decay: list[str] | None = None
    optimizer: OptimizerName | None = None
    ema_decay: PartOfWhole | None = None


IMAGE_KEYS = {
    *PROCESSOR_KEYS,
    *("drop_path_rate", "image_column", "label_column", "num_classes", "skip_broken_images"),
    *(field.name for field in dataclasses.fields(AugmentationSettings)),
}
"""Settings of image classification only."""
TEXT_KEYS = {field.name for field in dataclasses.fields(TextSettings)}
"""Settings of language modelling only."""
