"""The loss of NIO leaves no trace in the training."""

import collections

import pytest
from transformers import Trainer

from nio_hf import NIOTrainer, NIOTrainerMixin
from nio_hf.errors import ConfigError
from tests.trainer.toys import ToyImages, arguments, build


class Counting(Trainer):
    """Counts, collects and logs in its loss, as trainers of language models do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = 0
        self.by_mode = {"train": collections.defaultdict(list)}
        self.recent = collections.deque(maxlen=100)

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        self.calls += 1
        self.by_mode["train"]["loss"].append(float(loss.detach()))
        self.recent.append(1.0)
        self.log({"counted": self.calls})
        return loss


class CountingNIO(NIOTrainerMixin, Counting):
    pass


def test_counts_lists_and_logs_are_those_of_a_training_without_nio(tmp_path):
    found = []
    for nio in (False, True):
        args = arguments(tmp_path / str(nio), nio=nio, max_steps=3)
        trainer = CountingNIO(model=build("vit"), args=args, train_dataset=ToyImages())
        trainer.train()
        assert (trainer.nio_result is not None) is nio
        logged = [entry["counted"] for entry in trainer.state.log_history if "counted" in entry]
        found.append((trainer.calls, len(trainer.by_mode["train"]["loss"]), len(trainer.recent), logged))
    assert found[0] == found[1] == (3, 3, 3, [1, 2, 3])


def test_a_metric_that_no_evaluation_has_is_refused_before_nio(tmp_path):
    def trainer(**changes):
        settings = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True, **changes}
        sets = {"first": ToyImages(8), "second": ToyImages(8)}
        model = build("vit")
        return NIOTrainer(
            model=model, args=arguments(tmp_path, **settings), train_dataset=ToyImages(), eval_dataset=sets
        )

    for metric, fix in ((None, "first_loss, second_loss"), ("eval_first_f1", "compute_metrics")):
        refused = trainer(metric_for_best_model=metric)
        with pytest.raises(KeyError, match=fix) as raised:
            refused.train()
        assert isinstance(raised.value, ConfigError)
        assert refused.nio_result is None
    allowed = trainer(metric_for_best_model="second_loss")
    allowed.train()
    assert allowed.state.best_model_checkpoint is not None
