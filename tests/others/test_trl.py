"""NIO in the SFTTrainer of trl: its logs, its counts and its defaults are those without NIO."""

import dataclasses

import pytest
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, set_seed

from nio_hf import NIOTrainerMixin, NIOTrainingArguments

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")

pytestmark = pytest.mark.filterwarnings("default")  # what trl uses and transformers is about to remove

_TIMES = ("runtime", "per_second")


class NIOSFTTrainer(NIOTrainerMixin, trl.SFTTrainer):
    pass


class NIOSFTConfig(NIOTrainingArguments, trl.SFTConfig):
    pass


def _model():
    set_seed(0)
    # With dropout, so that a draw of NIO from the generator of the training would show.
    return GPT2LMHeadModel(GPT2Config(vocab_size=384, n_positions=64, n_embd=32, n_layer=2, n_head=2))


def _train(folder, own, model=None, **settings):
    arguments = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 2}
    arguments |= {"max_steps": 4, "per_device_train_batch_size": 8, "max_length": 48, "save_strategy": "no"}
    texts = datasets.Dataset.from_dict({"text": [f"{number} sentences of one text" for number in range(64)]})
    trainer_class, args_class = (NIOSFTTrainer, NIOSFTConfig) if own else (trl.SFTTrainer, trl.SFTConfig)
    args = args_class(**arguments, **settings)
    trainer = trainer_class(model or _model(), args, train_dataset=texts, processing_class=ByT5Tokenizer())
    trainer.train()
    return trainer


def _logs(trainer):
    """What the training has logged, without times and without what NIO has."""
    logs = [log for log in trainer.state.log_history if not any(key.startswith("nio_") for key in log)]
    return [{key: value for key, value in log.items() if not key.endswith(_TIMES)} for log in logs]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return _train(tmp_path_factory.mktemp("plain"), own=False)


def test_without_nio_the_logs_are_those_of_trl(plain, tmp_path):
    logs = _logs(_train(tmp_path, own=True, nio=False))
    assert logs == _logs(plain)
    assert {"num_tokens", "mean_token_accuracy", "entropy"} <= set(logs[0])


def test_with_nio_the_logs_are_those_of_trl_from_the_same_weights(plain, tmp_path):
    trainer = _train(tmp_path / "nio", own=True, nio_batch_size=16, nio_report_batches=2)
    assert all(group.omega > 1 for group in trainer.nio_result.groups)
    again = _train(tmp_path / "again", own=False, model=GPT2LMHeadModel.from_pretrained(trainer.nio_init_dir))
    assert _logs(trainer) == _logs(again) != _logs(plain)
    assert [log.get("num_tokens") for log in _logs(trainer)] == [log.get("num_tokens") for log in _logs(plain)]


def test_the_defaults_of_trl_survive(plain, tmp_path):
    own = NIOSFTConfig(output_dir=plain.args.output_dir, use_cpu=True)
    defaults = trl.SFTConfig(output_dir=plain.args.output_dir, use_cpu=True)
    for field in dataclasses.fields(trl.SFTConfig):
        if field.init:
            assert getattr(own, field.name) == getattr(defaults, field.name), field.name


def test_a_loss_without_second_derivatives_falls_back_to_finite_differences(tmp_path, caplog):
    settings = {"nio_search": "published", "nio_groups": "tensor", "nio_iterations": 2}
    trainer = _train(tmp_path, own=True, nio_batch_size=16, nio_report_batches=1, **settings)
    assert "Second derivatives by finite differences: an operation has no second derivative" in caplog.text
    assert len(trainer.nio_result.history) > 1
