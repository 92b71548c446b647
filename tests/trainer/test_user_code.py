"""NIO with a user's own model, collator, loss, data set and callbacks."""

import json
from typing import Any

import datasets
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import AutoModelForImageClassification, BatchFeature, TrainerCallback

from nio_hf import NIOTrainer
from nio_hf.errors import NIOMemoryError
from tests.trainer.toys import CLASSES, ToyImages, arguments, build, snapshot, unchanged


class Net(nn.Module):
    """A module that is no model of transformers, with a config whose `num_labels` means nothing to it."""

    def __init__(self):
        super().__init__()
        self.config = build("vit").config
        self.config.num_labels = 2
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, pixel_values, labels):
        logits = self.layers(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class NoisyCollator:
    """Draws from a generator of its own, as a collator that masks tokens does."""

    def __init__(self):
        self.generator = None
        self.draws = []

    def __call__(self, rows):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(0)
        self.draws.append(float(torch.rand((), generator=self.generator)))
        images = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": images, "labels": torch.tensor([row["labels"] for row in rows])}


class ImageStream(IterableDataset[dict[str, Any]]):
    """Few images, one after the other."""

    def __iter__(self):
        data = ToyImages(40)
        return iter([data[index] for index in range(len(data))])


def test_a_model_of_ones_own_is_not_held_to_a_config_it_does_not_follow(tmp_path):
    NIOTrainer(model=Net(), args=arguments(tmp_path), train_dataset=ToyImages()).run_nio()


def test_a_collator_with_a_generator_of_its_own_draws_the_same_in_training(tmp_path):
    draws = []
    for nio in (False, True):
        collator = NoisyCollator()
        args = arguments(tmp_path / str(nio), nio=nio)
        NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages(), data_collator=collator).train()
        draws.append(collator.draws)
    assert draws[0] == draws[1]
    assert draws[0]


def test_batches_keep_their_type_and_become_fp32(tmp_path):
    seen = set()

    class ByAttribute(NIOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.add((type(inputs), inputs.pixel_values.dtype))
            return nn.functional.cross_entropy(model(inputs.pixel_values.float()).logits, inputs.labels)

    def collate(rows):
        images = torch.stack([row["pixel_values"] for row in rows]).half()
        return BatchFeature({"pixel_values": images, "labels": torch.tensor([row["labels"] for row in rows])})

    args = arguments(tmp_path, remove_unused_columns=False)
    ByAttribute(model=build("vit"), args=args, train_dataset=ToyImages(), data_collator=collate).run_nio()
    assert seen == {(BatchFeature, torch.float32)}


@pytest.mark.parametrize("kind", ["torch", "datasets"])
def test_streams_are_iterated_as_often_as_it_takes(kind, tmp_path):
    stream = ImageStream() if kind == "torch" else datasets.IterableDataset.from_generator(lambda: iter(ImageStream()))
    args = arguments(tmp_path, nio_search="published", nio_iterations=6)
    result = NIOTrainer(model=build("vit"), args=args, train_dataset=stream).run_nio()
    assert len(result.history) == 6


class _OutOfMemoryOnce(TrainerCallback):
    failed = False

    def on_step_end(self, *args, **kwargs):
        if not self.failed:
            self.failed = True
            raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_training_that_starts_again_in_smaller_batches_keeps_nio_and_its_history(tmp_path):
    args = arguments(tmp_path, auto_find_batch_size=True)
    trainer = NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages(), callbacks=[_OutOfMemoryOnce()])
    trainer.train()
    assert trainer._train_batch_size < 8
    logged = [entry["nio_iteration"] for entry in trainer.state.log_history if "nio_iteration" in entry]
    assert logged == [record.iteration for record in trainer.nio_result.history]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("compute_nio_loss", "the first sub-batch: out of memory for 2 samples at once"),
        ("prepare_nio_batch", r"NIO: out of memory .* Set nio_micro_batch_size, or lower nio_batch_size"),
    ],
)
def test_an_out_of_memory_of_nio_on_the_cpu_does_not_shrink_the_training_batch(where, message, tmp_path):
    def full(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    args = arguments(tmp_path, auto_find_batch_size=True)
    trainer = type("Full", (NIOTrainer,), {where: full})(model=build("vit"), args=args, train_dataset=ToyImages())
    with pytest.raises(NIOMemoryError, match=message):
        trainer.train()
    assert trainer._train_batch_size == 8


def test_a_trained_model_does_not_carry_the_mark_of_its_initialisation(tmp_path):
    trainer = NIOTrainer(model=build("vit"), args=arguments(tmp_path / "init"), train_dataset=ToyImages())
    trainer.run_nio()
    loaded = AutoModelForImageClassification.from_pretrained(trainer.nio_init_dir, dtype=torch.float32)
    again = NIOTrainer(model=loaded, args=arguments(tmp_path / "trained"), train_dataset=ToyImages())
    again.train()
    again.save_model()
    assert again.nio_result is None
    assert "nio" not in json.loads((tmp_path / "trained" / "config.json").read_text())


def test_buffers_and_weights_stay_when_copying_back_fails(tmp_path, monkeypatch):
    model = build("resnet")
    before = snapshot(model)
    trainer = NIOTrainer(model=model, args=arguments(tmp_path), train_dataset=ToyImages())

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("nio_hf.trainer.trainer.take_over", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.run_nio()
    assert unchanged(before, snapshot(model))
