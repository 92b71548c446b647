"""Other methods than NIO under the Trainer."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForImageClassification

from nio_hf import NIOTrainingArguments
from nio_hf.baselines import METHODS
from nio_hf.errors import ConfigError
from nio_hf.hub.run_folder import INIT_DIR_NAME, read_run
from nio_hf.report import draw_run
from nio_hf.report.page import render_page
from nio_hf.trainer.methods import METHODS as ALL_METHODS
from tests.trainer.toys import load_state, losses, refused, same_weights, snapshot, trained, trainer_of


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_initialises_saves_and_is_reported(tmp_path, method):
    trainer = trainer_of(tmp_path, nio_method=method)
    before = snapshot(trainer.model)
    trainer.train()
    trainer.save_model()
    result = trainer.nio_result
    assert result is not None
    assert result.method == method
    assert result.status == "applied"
    saved = load_state(tmp_path / INIT_DIR_NAME)
    assert (saved.method, saved.options) == (method, result.options)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / INIT_DIR_NAME).state_dict()
    same = all(torch.equal(value, before[name]) for name, value in loaded.items())
    assert same == (method == "none")
    run = read_run(tmp_path)
    assert result.title in render_page(run)
    drawn = draw_run(run, tmp_path / "plots")
    assert any("iteration" in what for what in drawn) == bool(result.history)


def test_a_method_has_iterations_of_its_own(tmp_path):
    result = trainer_of(tmp_path, nio_method="gradinit", nio_method_kwargs={"iterations": 3}).run_nio()
    assert [record.iteration for record in result.history] == [1, 2, 3]
    assert result.options["iterations"] == 3


def test_a_method_is_taken_over_only_by_the_same_one(tmp_path):
    options = ({"alpha": 1.2}, '{"alpha": 1.2}', {"alpha": 1.5})
    first, again, other = (trainer_of(tmp_path, nio_method="emergence", nio_method_kwargs=option) for option in options)
    first.run_nio()
    again.run_nio(resume=True)
    assert same_weights(first, again)
    other.run_nio(resume=True)
    assert not same_weights(first, other)


def test_the_batches_of_the_training_are_those_without_a_method(tmp_path):
    """With a method that changes nothing, every loss is the same."""
    plain, initialised = (
        trained(tmp_path / name, logging_steps=1, **changes)
        for name, changes in {"plain": {"nio": False}, "none": {"nio_method": "none"}}.items()
    )
    assert losses(plain) == losses(initialised)


@pytest.mark.parametrize("options", [{"optimizer": "lion"}, {"iterations": "many"}, {"iterations": -3}])
def test_a_value_that_a_method_refuses_leaves_the_model_as_it_was(tmp_path, options):
    trainer = trainer_of(tmp_path, nio_method="gradinit", nio_method_kwargs=options)
    with refused(trainer, ConfigError, rf"gradinit.{next(iter(options))}: "):
        trainer.train()


def test_the_help_names_every_method():
    helps = {field.name: field.metadata.get("help", "") for field in dataclasses.fields(NIOTrainingArguments)}
    assert all(name in helps["nio_method"] for name in ALL_METHODS)
