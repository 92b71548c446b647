"""Settings of NIO are called as arguments wherever the Trainer speaks of them."""

import json
import logging

import pytest
import torch
from torch import nn

from nio_hf import NIOTrainer
from nio_hf.errors import ConfigError, DataError, ModelError, Problem
from nio_hf.hub.run_folder import STATE_NAME
from nio_hf.trainer.naming import in_arguments, named_as_arguments
from tests.trainer.toys import ToyImages, arguments, build, load_state


class TwoScalars(nn.Module):
    """A model without a tensor of two dimensions."""

    def __init__(self):
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def forward(self, pixel_values, labels):
        return {"loss": (self.slope * pixel_values.mean((1, 2, 3)) + self.offset - labels).square().mean()}


def test_a_text_and_a_problem_are_put_into_the_words_of_the_trainer():
    assert in_arguments("Set a lower NIOConfig.lr, or NIOConfig.gamma.") == "Set a lower nio_lr, or nio_gamma."
    problem = Problem("NIOConfig.groups", "NIOConfig.lr", 'Set NIOConfig.search to "balance"')
    assert in_arguments(problem) == Problem("nio_groups", "nio_lr", 'Set nio_search to "balance"')
    assert in_arguments("an NIOConfig of MyNIOConfig.lr") == "an NIOConfig of MyNIOConfig.lr"


def test_an_error_stays_the_one_that_it_is():
    raised = ConfigError(Problem("NIOConfig.lr", "0", "Raise it"), Problem("x", "y", "Set NIOConfig.seed"))
    with pytest.raises(ConfigError) as caught, named_as_arguments():
        raise raised
    assert caught.value is raised
    assert [problem.where for problem in raised.problems] == ["nio_lr", "x"]
    assert str(raised) == "2 problems:\n  1. nio_lr: 0. Raise it.\n  2. x: y. Set nio_seed."
    assert raised.args == raised.problems
    with pytest.raises(DataError, match="image 7: broken"), named_as_arguments():
        raise DataError("a worker's traceback\nnio_hf.errors.DataError: image 7: broken. Replace it.")
    with pytest.raises(KeyError, match=r"NIOConfig\.lr"), named_as_arguments():
        raise KeyError("NIOConfig.lr")


@pytest.mark.parametrize("action", [NIOTrainer.run_nio, NIOTrainer.train])
def test_a_model_that_nothing_of_can_be_scaled_is_refused_with_the_cure(action, tmp_path):
    with pytest.raises(ModelError, match='Set nio_scaled_tensors to "all"') as raised:
        action(_trainer(tmp_path, TwoScalars()))
    assert "NIOConfig" not in str(raised.value)


def test_groups_that_do_not_fit_the_model_are_refused_by_their_name(tmp_path):
    trainer = _trainer(tmp_path, build("vit"), nio_groups={"nothing": "no such name"})
    with pytest.raises(ConfigError) as raised:
        trainer.run_nio()
    assert [problem.where for problem in raised.value.problems] == ['nio_groups["nothing"]']


@pytest.mark.parametrize("action", [NIOTrainer.run_nio, NIOTrainer.inspect, NIOTrainer.squared_gradients])
def test_a_micro_batch_that_does_not_fit_the_model_is_refused_by_its_name(action, tmp_path):
    with pytest.raises(ConfigError) as raised:
        action(_trainer(tmp_path, build("resnet"), nio_micro_batch_size=1))
    assert [problem.where for problem in raised.value.problems] == ["nio_micro_batch_size"]
    assert "nio_sub_batches" in raised.value.problems[0].fix


def test_the_message_of_a_result_calls_settings_as_arguments(tmp_path, caplog):
    trainer = _trainer(tmp_path, build("vit"), nio_search="published", nio_gamma=1e-3, nio_iterations=2)
    with caplog.at_level(logging.WARNING, "nio_hf.trainer"):
        result = trainer.run_nio()
    assert result.status == "constraint_violated"
    assert result.message.endswith("Set a lower nio_lr, or more nio_iterations.")
    assert result.message in caplog.text
    assert "NIOConfig" not in caplog.text
    assert load_state(trainer.nio_init_dir).message == result.message
    assert "NIOConfig" not in json.dumps(json.loads((trainer.nio_init_dir / STATE_NAME).read_text()))


def _trainer(output_dir, model, **changes):
    return NIOTrainer(model=model, args=arguments(output_dir, **changes), train_dataset=ToyImages())
