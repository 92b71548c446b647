"""Small images and arguments for tests of the Trainer."""

from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, set_seed

from nio_hf import NIOResult, NIOTrainingArguments
from nio_hf.hub.run_folder import read_state
from tests.zoo import vision_model

CLASSES = 5


class ToyImages(Dataset[dict[str, Any]]):
    """Noise with a bright patch whose place tells the class."""

    def __init__(self, samples=64):
        generator = torch.Generator().manual_seed(0)
        self.images = 0.3 * torch.randn(samples, 3, 32, 32, generator=generator)
        self.labels = torch.randint(0, CLASSES, (samples,), generator=generator)
        for image, label in zip(self.images, self.labels.tolist(), strict=True):
            image[:, 6 * label : 6 * label + 6] += 1.0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": int(self.labels[index])}


def load_state(directory):
    """The result of the run of NIO that is described in a folder."""
    return NIOResult.from_dict(read_state(directory)["result"])


class Interruption(Exception):  # noqa: N818
    """What ends a training or a run of NIO in a test."""


class InterruptedAfter(TrainerCallback):
    """Raises at the end of a step, after the save that is due then."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interruption


def build(name, **config):
    """A tiny model with the same weights at every call."""
    set_seed(0)
    return vision_model(name, num_labels=CLASSES, **config)


def arguments(output_dir, **changes):
    """Arguments for two training steps behind a short run of NIO."""
    settings = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "nio_batch_size": 8,
        "nio_report_batches": 2,
    }
    return NIOTrainingArguments(**{**settings, **changes})


def snapshot(model):
    """Copies of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def unchanged(left, right):
    """Whether two snapshots are bit-equal, NaN included."""
    return left.keys() == right.keys() and all(
        torch.equal(left[name].nan_to_num(), right[name].nan_to_num()) for name in left
    )
