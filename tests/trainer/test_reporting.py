"""The report of NIO in the log history and in trackers."""

import dataclasses
import json
import math

import pytest
from transformers import TrainerCallback

from nio_hf import NIOTrainer
from nio_hf.core import IterationRecord
from nio_hf.trainer.reporting import summary
from tests.trainer.toys import ToyImages, arguments, build


class Tracker(TrainerCallback):
    """A tracker that keeps all that is logged, with its step."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Keep a row."""
        self.logged.append((state.global_step, dict(logs)))


def trained(output_dir):
    tracker = Tracker()
    args = arguments(output_dir, logging_steps=1)
    trainer = NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages(), callbacks=[tracker])
    trainer.train()
    return trainer, tracker


def test_trackers_get_the_measurements_once_before_the_first_step(tmp_path):
    trainer, tracker = trained(tmp_path)
    rows = [(step, row) for step, row in tracker.logged if "nio_cost" in row]
    assert [step for step, _ in rows] == [0]
    assert rows[0][1] == {**summary(trainer.nio_result), "epoch": pytest.approx(0)}
    assert tracker.logged[0] == rows[0]
    trainer.train()
    assert len([row for _, row in tracker.logged if "nio_cost" in row]) == 1


def test_values_that_are_not_finite_are_left_out_of_the_log(tmp_path):
    trainer = NIOTrainer(model=build("vit"), args=arguments(tmp_path), train_dataset=ToyImages())
    result = trainer.run_nio()
    count = len(result.history)
    broken = IterationRecord(count + 1, "all x64", "loss_bound", math.nan)
    result = dataclasses.replace(result, history=(*result.history, broken))
    trainer._nio_report.report_later(result, trainer.model)
    trainer.train()
    json.dumps(trainer.state.log_history, allow_nan=False)
    (entry,) = (entry for entry in trainer.state.log_history if entry.get("nio_iteration") == count + 1)
    assert {name for name in entry if name.startswith("nio_")} == {
        *("nio_iteration", "nio_tried", "nio_outcome", "nio_cost", "nio_seconds")
    }
