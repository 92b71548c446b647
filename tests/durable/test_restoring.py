"""Restoring checkpoints into models that differ from their config."""

import copy

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import Trainer

from nio_hf.durable import DurableTrainerMixin
from nio_hf.durable.restoring import restore, restore_all
from tests.durable.trainings import SAVING
from tests.trainer.toys import CLASSES, build, refused, snapshot, trained, trainer_of, unchanged


class DurableTrainer(DurableTrainerMixin, Trainer):
    """The mixin by itself, without NIO."""


def with_own_head(name):
    """A model of the library with a replaced head."""
    model = build(name)
    model.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(model.classifier.in_features, CLASSES))
    return model


def with_further_arguments(name):
    """A user's class with a further argument and a layer after those of the library."""
    stock = build(name)

    class Own(type(stock)):
        def __init__(self, config, width):
            super().__init__(config)
            self.further = nn.Linear(width, CLASSES)

        def forward(self, pixel_values, labels=None, **kwargs):
            outputs = super().forward(pixel_values=pixel_values, **kwargs)
            logits = self.further(outputs.logits)
            loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
            return {"loss": loss, "logits": logits}

    torch.manual_seed(0)
    return Own(stock.config, CLASSES)


def with_edited_config(name):
    """A model whose config was edited after it was built."""
    model = build(name)
    if name == "swin":
        model.config.depths = [depth + 1 for depth in model.config.depths]
    else:
        model.config.num_hidden_layers += 1
    return model


def in_two_precisions(name):
    """A frozen body in bfloat16 with a head in fp32."""
    model = with_own_head(name)
    body = getattr(model, model.base_model_prefix).to(torch.bfloat16)
    body.requires_grad_(False)
    head = model.classifier

    class Cast(nn.Module):
        def forward(self, values):
            return values.float()

    model.classifier = nn.Sequential(Cast(), *head)
    return model


MODELS = {
    "stock": build,
    "own head": with_own_head,
    "further arguments": with_further_arguments,
    "edited config": with_edited_config,
    "two precisions": in_two_precisions,
}


@pytest.mark.parametrize("name", ["vit", "swin"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_tensor_comes_back_bit_for_bit(kind, name, tmp_path):
    saved = MODELS[kind](name)
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter += torch.rand_like(parameter) / 3
    saved.save_pretrained(tmp_path)
    model = MODELS[kind](name)
    dtypes = {key: tensor.dtype for key, tensor in model.state_dict().items()}
    assert not unchanged(snapshot(saved), snapshot(model))
    assert restore(tmp_path, model), "it takes a conversion"
    assert unchanged(snapshot(saved), snapshot(model))
    assert {key: tensor.dtype for key, tensor in model.state_dict().items()} == dtypes


def test_a_model_whose_names_are_those_of_the_file_and_a_folder_without_weights_are_left_to_trainer(tmp_path):
    model = nn.Linear(3, 4)
    assert not restore(tmp_path, model)
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    before = snapshot(model)
    with torch.no_grad():
        model.weight += 1
    assert not restore(tmp_path, model)
    assert restore_all(tmp_path, model)
    assert unchanged(before, snapshot(model))


def test_a_tensor_that_is_not_to_be_had_is_named(tmp_path, caplog):
    saved = build("vit")
    saved.save_pretrained(tmp_path)
    config = copy.deepcopy(saved.config)
    config.num_hidden_layers += 1
    model = type(saved)(config)
    assert restore(tmp_path, model)
    last = config.num_hidden_layers - 1
    assert "does not hold" in caplog.text
    assert f"layers.{last}." in caplog.text or f"layer.{last}." in caplog.text
    assert "they stay as they are" in caplog.text
    restored = model.state_dict()
    assert all(torch.equal(tensor, restored[name]) for name, tensor in saved.state_dict().items())
    assert not restore_all(tmp_path, type(saved)(config))


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path):
    trained(tmp_path, DurableTrainer, **SAVING)
    trainer = trainer_of(tmp_path, DurableTrainer, model=build("vit", intermediate_size=24), **SAVING)
    # Trainer has a RuntimeError for it where the names are the same.
    with refused(
        trainer, RuntimeError, r"checkpoint-2: holds .*weight with shape \(\d+, 16\), the model has \(24, 16\)"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
