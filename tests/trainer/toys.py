"""Small images, models, trainers and disturbances for tests of the Trainer."""

import contextlib
import inspect

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, set_seed

from nio_hf import NIOResult, NIOTrainer, NIOTrainingArguments
from nio_hf.hub.run_folder import read_state
from tests.zoo import vision_model

CLASSES = 5
PUBLISHED = {"nio_search": "published", "nio_groups": "tensor", "nio_iterations": 5, "nio_lr": 0.05}
"""A short search whose scales differ where a loss does; those that are computed may not."""
TRAINER_TAKES = set(inspect.signature(Trainer.__init__).parameters) - {"self"}


class ToyImages(Dataset):
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


def trainer_of(output_dir, trainer_class=NIOTrainer, **given):
    """A trainer of a tiny ViT. What Trainer takes of what is given goes to it, the rest to its arguments."""
    taken = {name: given.pop(name) for name in TRAINER_TAKES & given.keys()}
    if not {"model", "model_init"} & taken.keys():
        taken["model"] = build("vit")
    settings = {"args": arguments(output_dir, **given), "train_dataset": ToyImages()}
    return trainer_class(**{**settings, **taken})


def trained(output_dir, trainer_class=NIOTrainer, resume=None, **given):
    """A trainer, as `trainer_of` makes it, that has trained."""
    trainer = trainer_of(output_dir, trainer_class, **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def load_state(directory):
    """The result of the run of NIO that is described in a folder."""
    return NIOResult.from_dict(read_state(directory)["result"])


def snapshot(model):
    """Copies of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def unchanged(left, right):
    """Whether two snapshots are bit-equal, NaN included."""
    return left.keys() == right.keys() and all(
        torch.equal(left[name].nan_to_num(), right[name].nan_to_num()) for name in left
    )


def same_weights(*trainers):
    first, *others = (snapshot(trainer.model) for trainer in trainers)
    return all(unchanged(first, other) for other in others)


@contextlib.contextmanager
def refused(trainer, error, match=None):
    """Expects that what is within is refused, and leaves the model as it was and no result."""
    before = snapshot(trainer.model)
    with pytest.raises(error, match=match) as raised:
        yield raised
    assert unchanged(before, snapshot(trainer.model))
    assert getattr(trainer, "nio_result", None) is None


class Observed(NIOTrainer):
    """Keeps the result of each run of NIO with the weights that it left, and those that each training began with."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.results = []
        self.initialised = []
        self.begun_with = []
        self.add_callback(_KeepWeights(self.begun_with))

    def run_nio(self, *args, **kwargs):
        self.results.append(super().run_nio(*args, **kwargs))
        self.initialised.append(snapshot(self.unwrapped_model))
        return self.results[-1]


class _KeepWeights(TrainerCallback):
    def __init__(self, kept):
        self.kept = kept

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.kept.append(snapshot(model))


class Interruption(Exception):  # noqa: N818
    """What ends a training or a run of NIO in a test."""


class InterruptedAfter(TrainerCallback):
    """Raises at the end of a step, after the save that is due then."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Interruption


def interrupted(trainer, resume=None):
    """The trainer after a training that was interrupted behind three steps; the next one is not."""
    stop = InterruptedAfter(3)
    trainer.add_callback(stop)
    with pytest.raises(Interruption):
        trainer.train(resume_from_checkpoint=resume)
    trainer.remove_callback(stop)
    return trainer


class At(TrainerCallback):
    """Carries out an action once at an event, the first time or after a number of steps."""

    def __init__(self, event, action, steps=None):
        self.action, self.steps, self.is_done = action, steps, False
        setattr(self, event, self._act)

    def _act(self, args, state, control, **kwargs):
        if not self.is_done and self.steps in (None, state.global_step):
            self.is_done = True
            self.action()
