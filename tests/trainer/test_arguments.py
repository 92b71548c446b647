"""The settings of NIO beside the training arguments."""

import dataclasses
import pickle
import re

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments

from nio_hf import NIOTrainer, NIOTrainerMixin, NIOTrainingArguments
from nio_hf.core import NIOConfig
from nio_hf.core.config import REPLACED
from nio_hf.errors import ConfigError
from nio_hf.trainer.arguments import NIOSettings
from tests.trainer.toys import ToyImages, arguments, build


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nio_batch_size": 4, "nio_sub_batches": 8}, "nio_sub_batches: 8 for a batch of 4 samples"),
        ({"nio_batch_size": 0}, "nio_batch_size: 0"),
        ({"nio_batch_size": "16"}, "nio_batch_size: '16'"),
        ({"nio_sub_batches": 1}, "nio_sub_batches: 1"),
        ({"nio_overlap": 1.0}, "nio_overlap: 1.0"),
        ({"nio_iterations": 0}, "nio_iterations: 0"),
        ({"nio_gamma": -1.0}, "nio_gamma: -1.0"),
        ({"nio_objective": "cosine"}, "nio_objective: 'cosine'"),
        ({"nio_search": "scam"}, "nio_search: 'scam'. Choose one of balance, published"),
        ({"nio_strength": 0.0}, "nio_strength: 0.0"),
        ({"nio_strength": "half"}, "nio_strength: 'half'"),
        ({"nio_report_batches": 0}, "nio_report_batches: 0"),
        ({"nio_groups": None}, "nio_groups: None"),
        ({"nio_groups": "[1]"}, "nio_groups: [1]"),
        ({"nio_groups": "kind"}, "nio_groups: 'kind'"),
        ({"nio_least_norm": 1.5}, "nio_least_norm: 1.5"),
        ({"nio_scale_range": [1.0, float("inf")]}, "nio_scale_range: (1.0, inf)"),
        ({"nio_loss_bound": -0.1}, "nio_loss_bound: -0.1"),
    ],
)
def test_settings_out_of_range_are_refused_at_once_by_their_own_name(changes, message, tmp_path):
    with pytest.raises(ConfigError) as raised:
        arguments(tmp_path, **changes)
    assert message in str(raised.value)


def test_all_problems_are_reported_together(tmp_path):
    with pytest.raises(ConfigError) as raised:
        arguments(tmp_path, nio_search="published", nio_batch_size=1, nio_lr=0.0, nio_overlap=2.0)
    assert [problem.where for problem in raised.value.problems] == ["nio_batch_size", "nio_lr", "nio_overlap"]


@pytest.mark.parametrize(
    ("changes", "where", "fix"),
    [
        (
            {"nio_precision": "bf16", "nio_curvature": "finite_difference"},
            "nio_precision",
            'Set nio_curvature to "exact": bfloat16 rounds away the difference of two gradients',
        ),
        ({"nio_gamma": 1.0}, "nio_gamma", 'Leave it out, or set nio_search to "published", which alone reads it'),
        (
            {"nio_overlap": 0.2, "nio_groups": "tensor"},
            "nio_overlap",
            'Leave it out, or set nio_search to "published", which alone reads it',
        ),
        (
            {"nio_batch_size": 4, "nio_sub_batches": 8},
            "nio_sub_batches",
            "Choose 2 to 4 sub-batches, or a larger batch",
        ),
    ],
)
def test_problems_call_every_setting_as_the_trainer_does(changes, where, fix, tmp_path):
    with pytest.raises(ConfigError) as raised:
        arguments(tmp_path, **changes)
    assert [(problem.where, problem.fix) for problem in raised.value.problems] == [(where, fix)]
    assert "NIOConfig" not in str(raised.value)


@pytest.mark.parametrize("name", REPLACED)
def test_a_former_setting_is_refused_with_what_replaces_it(name, tmp_path):
    with pytest.raises(ConfigError) as raised:
        arguments(tmp_path, **{f"nio_{name}": 1})
    (problem,) = raised.value.problems
    assert (problem.where, problem.found) == (f"nio_{name}", "is a setting of a former version")
    assert problem.fix == REPLACED[name].replace("NIOConfig.", "nio_")
    named = re.findall(r"\bnio_\w+", problem.fix)
    assert {*named} <= {field.name for field in dataclasses.fields(NIOTrainingArguments)}
    assert named or problem.fix.startswith("Leave it out")


def test_former_settings_are_reported_together(tmp_path):
    with pytest.raises(ConfigError) as raised:
        NIOTrainingArguments(output_dir=str(tmp_path), nio_holdout_batches=2, nio_max_loss_rise=0.1)
    assert [problem.where for problem in raised.value.problems] == ["nio_holdout_batches", "nio_max_loss_rise"]


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
    """Arguments of somebody's own, with other defaults and further fields."""

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


def test_the_mixin_takes_the_arguments_of_the_trainer_it_extends(tmp_path):
    class NIOSeq2SeqTrainer(NIOTrainerMixin, Seq2SeqTrainer):
        pass

    given = Seq2SeqTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", generation_max_length=7)
    trainer = NIOSeq2SeqTrainer(model=build("vit"), args=given, train_dataset=ToyImages())
    assert trainer.args is given
    assert trainer.nio_args.nio_sub_batches == 4


def test_what_a_script_sets_on_its_own_arguments_later_counts(tmp_path):
    given = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=9, save_strategy="no")
    trainer = NIOTrainer(model=build("vit"), args=given, train_dataset=ToyImages())
    trainer.nio_args.nio = False
    given.max_steps = 1
    assert trainer.train().global_step == 1


def test_arguments_of_another_type_are_refused():
    with pytest.raises(ConfigError, match="Give NIOTrainingArguments"):
        NIOTrainer(model=build("vit"), args={"output_dir": "x"}, train_dataset=ToyImages())


def test_no_default_of_training_arguments_is_changed(tmp_path):
    plain = TrainingArguments(output_dir=str(tmp_path)).to_dict()
    ours = NIOTrainingArguments(output_dir=str(tmp_path)).to_dict()
    assert {key: ours[key] for key in plain} == plain
    assert ours["warmup_steps"] == 0
