"""Other methods than NIO under the Trainer."""

import pytest
import torch
from transformers import AutoModelForImageClassification

from nio_hf import NIOTrainer
from nio_hf.baselines import METHODS
from nio_hf.errors import ConfigError
from nio_hf.hub.run_folder import INIT_DIR_NAME, read_run
from nio_hf.report import draw_run
from nio_hf.report.page import render_page
from nio_hf.trainer.methods import METHODS as ALL_METHODS
from tests.trainer.toys import ToyImages, arguments, build, load_state, snapshot

METHODS_OF_TESTS = sorted(METHODS)


def _trainer(output_dir, **changes):
    return NIOTrainer(build("vit"), arguments(output_dir, **changes), train_dataset=ToyImages())


@pytest.mark.parametrize("method", METHODS_OF_TESTS)
def test_every_method_initialises_saves_and_is_reported(tmp_path, method):
    trainer = _trainer(tmp_path, nio_method=method)
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
    result = _trainer(tmp_path, nio_method="gradinit", nio_method_kwargs={"iterations": 3}).run_nio()
    assert [record.iteration for record in result.history] == [1, 2, 3]
    assert result.options["iterations"] == 3


def test_a_method_is_taken_over_only_by_the_same_one(tmp_path):
    first = _trainer(tmp_path, nio_method="emergence", nio_method_kwargs={"alpha": 1.2})
    first.run_nio()
    expected = snapshot(first.model)
    again = _trainer(tmp_path, nio_method="emergence", nio_method_kwargs='{"alpha": 1.2}')
    again.run_nio(resume=True)
    assert all(torch.equal(value, expected[name]) for name, value in snapshot(again.model).items())
    other = _trainer(tmp_path, nio_method="emergence", nio_method_kwargs={"alpha": 1.5})
    other.run_nio(resume=True)
    assert any(not torch.equal(value, expected[name]) for name, value in snapshot(other.model).items())


def test_the_batches_of_the_training_are_those_without_a_method(tmp_path):
    """With learning rate 0 and a method that changes nothing, every loss is the same."""
    losses = []
    for changes in ({"nio": False}, {"nio_method": "none"}):
        trainer = _trainer(tmp_path / str(len(losses)), logging_steps=1, **changes)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"nio_method": "other"}, "nio_method: 'other'"),
        ({"nio_method": "gradinit", "nio_method_kwargs": {"optimiser": "sgd"}}, "'optimiser' is no option of gradinit"),
        ({"nio_method_kwargs": {"optimizer": "sgd"}}, "'optimizer' is no option of nio"),
        ({"nio_method": "lsuv", "nio_method_kwargs": "tol=1"}, "nio_method_kwargs: 'tol=1'"),
        ({"nio_method": "lsuv", "nio_method_kwargs": "[1]"}, "Give a mapping"),
    ],
)
def test_settings_that_no_method_has_are_refused(tmp_path, changes, found):
    with pytest.raises(ConfigError, match=found):
        arguments(tmp_path, **changes)


@pytest.mark.parametrize("options", [{"optimizer": "lion"}, {"iterations": "many"}, {"iterations": -3}])
def test_a_value_that_a_method_refuses_leaves_the_model_as_it_was(tmp_path, options):
    trainer = _trainer(tmp_path, nio_method="gradinit", nio_method_kwargs=options)
    before = snapshot(trainer.model)
    with pytest.raises(ConfigError, match=rf"gradinit.{next(iter(options))}: "):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in snapshot(trainer.model).items())


def test_the_help_names_every_method():
    from dataclasses import fields

    from nio_hf import NIOTrainingArguments

    text = next(field.metadata["help"] for field in fields(NIOTrainingArguments) if field.name == "nio_method")
    assert all(name in text for name in ALL_METHODS)
