"""The settings of NIO beside the training arguments, and called as arguments wherever the Trainer speaks of them."""

import dataclasses
import json
import pickle
import re

import pytest
import torch
from torch import nn
from transformers import HfArgumentParser, TrainingArguments

from nio_hf import NIOTrainer, NIOTrainingArguments
from nio_hf.core import NIOConfig
from nio_hf.core.config import REPLACED
from nio_hf.errors import ConfigError, DataError, ModelError, Problem
from nio_hf.hub.run_folder import STATE_NAME
from nio_hf.trainer.arguments import NIOSettings
from nio_hf.trainer.naming import named_as_arguments
from tests.trainer.toys import ToyImages, arguments, build, load_state, trainer_of


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nio_batch_size": 0}, "nio_batch_size: 0"),
        ({"nio_batch_size": "16"}, "nio_batch_size: '16'"),
        (
            {"nio_batch_size": 4, "nio_sub_batches": 8},
            "nio_sub_batches: 8 for a batch of 4 samples. Choose 2 to 4 sub-batches, or a larger batch",
        ),
        ({"nio_strength": "half"}, "nio_strength: 'half'"),
        ({"nio_groups": "[1]"}, "nio_groups: [1]"),
        ({"nio_scale_range": [1.0, float("inf")]}, "nio_scale_range: (1.0, inf)"),
        ({"nio_search": "scam"}, "nio_search: 'scam'. Choose one of balance, published"),
        (
            {"nio_precision": "bf16", "nio_curvature": "finite_difference"},
            'Set nio_curvature to "exact": bfloat16 rounds away the difference of two gradients',
        ),
        (
            {"nio_overlap": 0.2, "nio_groups": "tensor"},
            'nio_overlap: 0.2. Leave it out, or set nio_search to "published", which alone reads it',
        ),
        ({"nio_method": "other"}, "nio_method: 'other'"),
        ({"nio_method": "gradinit", "nio_method_kwargs": {"optimiser": "sgd"}}, "'optimiser' is no option of gradinit"),
        ({"nio_method_kwargs": {"optimizer": "sgd"}}, "'optimizer' is no option of nio"),
        ({"nio_method": "lsuv", "nio_method_kwargs": "tol=1"}, "nio_method_kwargs: 'tol=1'"),
        ({"nio_method": "lsuv", "nio_method_kwargs": "[1]"}, "Give a mapping"),
        ({"nio_seed_optimizer": "yes"}, "nio_seed_optimizer: 'yes'"),
        *(
            ({"nio_race_steps": value}, f"nio_race_steps: {value!r}. Give a whole number, 0 for none")
            for value in (-1, 1.5, True, "ten")
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once_by_their_own_name(changes, said, tmp_path):
    with pytest.raises(ConfigError) as raised:
        arguments(tmp_path, **changes)
    (problem,) = raised.value.problems
    assert said in str(problem)
    assert "NIOConfig" not in str(problem)


def test_all_problems_are_reported_together(tmp_path):
    with pytest.raises(ConfigError) as raised:
        arguments(tmp_path, nio_search="published", nio_batch_size=1, nio_lr=0.0, nio_overlap=2.0)
    assert [problem.where for problem in raised.value.problems] == ["nio_batch_size", "nio_lr", "nio_overlap"]


def test_former_settings_are_refused_with_what_replaces_them(tmp_path):
    with pytest.raises(ConfigError) as raised:
        arguments(tmp_path, **{f"nio_{name}": 1 for name in REPLACED})
    for name, problem in zip(REPLACED, raised.value.problems, strict=True):
        assert (problem.where, problem.found) == (f"nio_{name}", "is a setting of a former version")
        assert problem.fix == REPLACED[name].replace("NIOConfig.", "nio_")
        named = re.findall(r"\bnio_\w+", problem.fix)
        assert {*named} <= {field.name for field in dataclasses.fields(NIOTrainingArguments)}
        assert named or problem.fix.startswith("Leave it out")


def test_every_setting_of_nio_is_an_argument_with_the_same_default_and_a_description(tmp_path):
    assert NIOTrainingArguments(output_dir=str(tmp_path), seed=NIOConfig.seed).to_nio_config() == NIOConfig()
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(NIOSettings)}
    assert {f"nio_{field.name}" for field in dataclasses.fields(NIOConfig)} <= helps.keys()
    assert helps["nio_report_batches"].startswith("Number of batches on which GC, GN and loss are measured before and")
    assert all(text.endswith(".") and "[`" not in text for text in helps.values())


def test_the_seed_of_nio_follows_that_of_the_data(tmp_path):
    assert arguments(tmp_path, seed=3).to_nio_config().seed == 3
    assert arguments(tmp_path, seed=3, data_seed=4).to_nio_config().seed == 4
    assert arguments(tmp_path, seed=3, data_seed=4, nio_seed=5).to_nio_config().seed == 5


def test_the_command_line_parser_of_transformers_knows_the_settings(tmp_path):
    options = ["--output_dir", str(tmp_path), "--nio_lr", "1e-3", "--nio_sub_batches", "8", "--nio", "false"]
    (args,) = HfArgumentParser(NIOTrainingArguments).parse_args_into_dataclasses(options)
    assert (args.nio_lr, args.nio_sub_batches, args.nio) == (1e-3, 8, False)
    assert args.nio_groups == "additive"
    options += ["--nio_strength", "0.5", "--nio_scale_range", "0.5", "8"]
    options += ["--nio_groups", '{"positions": "position_embeddings"}']
    (args,) = HfArgumentParser(NIOTrainingArguments).parse_args_into_dataclasses(options)
    assert args.nio_groups == {"positions": "position_embeddings"}
    config = args.to_nio_config()
    assert (config.strength, config.scale_range) == (0.5, (0.5, 8.0))
    (args,) = HfArgumentParser(NIOTrainingArguments).parse_args_into_dataclasses([*options[:-1], "model"])
    assert args.nio_groups == "model"


@dataclasses.dataclass
class OwnArguments(TrainingArguments):
    """Arguments of somebody's own, with other defaults and a further field."""

    learning_rate: float = 2e-5
    logging_steps: float = 10
    words: list[str] = dataclasses.field(default_factory=lambda: ["own"])


class Undecorated(NIOTrainingArguments, OwnArguments):
    pass


@dataclasses.dataclass
class Decorated(NIOTrainingArguments, OwnArguments):
    more: int = 7


class Behind(OwnArguments, NIOTrainingArguments):
    pass


@dataclasses.dataclass
class SettingsBeside(NIOSettings, OwnArguments):
    pass


@pytest.mark.parametrize("kind", [Undecorated, Decorated, Behind, SettingsBeside])
def test_the_defaults_of_other_arguments_hold(kind, tmp_path):
    args = kind(output_dir=str(tmp_path), report_to="none", nio_groups="model", warmup_steps=3)
    assert (args.learning_rate, args.logging_steps, args.words) == (2e-5, 10, ["own"])
    assert (args.nio_groups, args.nio_sub_batches, args.warmup_steps) == ("model", 4, 3)
    again = pickle.loads(pickle.dumps(kind(output_dir=str(tmp_path), words=["given"], learning_rate=0.25)))
    assert (again.words, again.learning_rate, again.to_dict()["nio_groups"]) == (["given"], 0.25, "additive")
    (parsed,) = HfArgumentParser(kind).parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--nio", "false"])
    assert (parsed.learning_rate, parsed.nio) == (2e-5, False)


def test_arguments_of_trainer_get_the_settings_of_nio_beside_them_and_others_are_refused(tmp_path):
    given = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1, save_strategy="no")
    trainer = NIOTrainer(model=build("vit"), args=given, train_dataset=ToyImages())
    assert trainer.nio_args.nio_sub_batches == 4
    trainer.nio_args.nio = False
    trainer.train()
    assert trainer.nio_result is None
    with pytest.raises(ConfigError, match="Give NIOTrainingArguments"):
        NIOTrainer(model=build("vit"), args={"output_dir": "x"}, train_dataset=ToyImages())


class TwoScalars(nn.Module):
    """A model without a tensor of two dimensions."""

    def __init__(self):
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def forward(self, pixel_values, labels):
        return {"loss": (self.slope * pixel_values.mean((1, 2, 3)) + self.offset - labels).square().mean()}


def test_an_error_stays_the_one_that_it_is():
    raised = ConfigError(Problem("NIOConfig.lr", "0", "Raise it"), Problem("MyNIOConfig.lr", "y", "Set NIOConfig.seed"))
    with pytest.raises(ConfigError) as caught, named_as_arguments():
        raise raised
    assert caught.value is raised
    assert str(raised) == "2 problems:\n  1. nio_lr: 0. Raise it.\n  2. MyNIOConfig.lr: y. Set nio_seed."
    with pytest.raises(DataError, match="image 7: broken"), named_as_arguments():
        raise DataError("a worker's traceback\nnio_hf.errors.DataError: image 7: broken. Replace it.")
    with pytest.raises(KeyError, match=r"NIOConfig\.lr"), named_as_arguments():
        raise KeyError("NIOConfig.lr")


@pytest.mark.parametrize("action", [NIOTrainer.run_nio, NIOTrainer.train])
def test_a_model_that_nothing_of_can_be_scaled_is_refused_with_the_cure(action, tmp_path):
    with pytest.raises(ModelError, match='Set nio_scaled_tensors to "all"') as raised:
        action(trainer_of(tmp_path, model=TwoScalars()))
    assert "NIOConfig" not in str(raised.value)


def test_groups_that_do_not_fit_the_model_are_refused_by_their_name(tmp_path):
    trainer = trainer_of(tmp_path, nio_groups={"nothing": "no such name"})
    with pytest.raises(ConfigError) as raised:
        trainer.run_nio()
    assert [problem.where for problem in raised.value.problems] == ['nio_groups["nothing"]']


@pytest.mark.parametrize("action", [NIOTrainer.run_nio, NIOTrainer.inspect, NIOTrainer.squared_gradients])
def test_a_micro_batch_that_does_not_fit_the_model_is_refused_by_its_name(action, tmp_path):
    with pytest.raises(ConfigError) as raised:
        action(trainer_of(tmp_path, model=build("resnet"), nio_micro_batch_size=1))
    assert [problem.where for problem in raised.value.problems] == ["nio_micro_batch_size"]
    assert "nio_sub_batches" in raised.value.problems[0].fix


def test_the_message_of_a_result_calls_settings_as_arguments(tmp_path, caplog):
    trainer = trainer_of(tmp_path, nio_search="published", nio_gamma=1e-3, nio_iterations=2)
    result = trainer.run_nio()
    assert result.status == "constraint_violated"
    assert result.message.endswith("Set a lower nio_lr, or more nio_iterations.")
    assert result.message in caplog.text
    assert "NIOConfig" not in caplog.text
    assert load_state(trainer.nio_init_dir).message == result.message
    assert "NIOConfig" not in json.dumps(json.loads((trainer.nio_init_dir / STATE_NAME).read_text()))
