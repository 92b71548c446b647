"""The race: what its lanes are, who wins it, what it leaves behind, and how it goes on."""

import dataclasses
import functools
import itertools
import json
import logging
import statistics

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from nio_hf import NIOTrainer
from nio_hf.core.result import InitResult, Lane
from nio_hf.durable import AUTO
from nio_hf.errors import ConfigError, DataError, NIOMemoryError, Preempted
from nio_hf.report.run import Run
from nio_hf.report.tables import cost_text, summary_rows
from nio_hf.trainer import race as races
from nio_hf.trainer.race import START, is_behind, leader, planned_steps
from tests.durable.trainings import Counting, terminate
from tests.trainer import toys
from tests.trainer.toys import Interruption, ToyImages, build, load_state, losses, refused, same_weights

STEPS = 8
FAR_OFF = {"nio_method": "range", "nio_method_kwargs": {"factor": 300.0}}
"""An initialisation that harms the training."""
WAYS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "clipped and warmed up": {"max_grad_norm": 0.1, "warmup_steps": 5},
    "seeded": {"nio_seed_optimizer": "gi_adam"},
    "another optimizer": {"optim": "adafactor"},
    "bf16": {"bf16": True},
    "smoothed": {"label_smoothing_factor": 0.1},
    "workers": {"dataloader_num_workers": 2},
}
RACING = {"max_steps": 20, "learning_rate": 1e-3, "logging_steps": 1, "nio_race_steps": STEPS}
trainer_of = functools.partial(toys.trainer_of, **RACING)
trained = functools.partial(toys.trained, **RACING)


def let_win(name, monkeypatch):
    monkeypatch.setattr(races, "leader", lambda lanes, steps: next((lane for lane in lanes if lane.name == name), None))


def disturbed(number, action):
    """A class of trainers that do something in a training step, those of all lanes counted."""
    steps = itertools.count(1)

    class Disturbed(NIOTrainer):
        def training_step(self, *args, **kwargs):
            if next(steps) == number:
                action()
            return super().training_step(*args, **kwargs)

    return Disturbed


def interrupt():
    raise Interruption


@pytest.mark.parametrize("way", WAYS)
def test_a_lane_is_the_beginning_of_the_training_from_its_weights(way, tmp_path):
    raced = trained(tmp_path / "raced", **WAYS[way])
    without = trained(tmp_path / "without", nio_race_steps=0, **WAYS[way])
    start = trained(tmp_path / "start", nio=False, **WAYS[way])
    lanes = {lane.name: list(lane.losses) for lane in raced.nio_result.race.lanes}
    assert lanes["NIO"] == pytest.approx(losses(without)[:STEPS], abs=1e-6)
    assert lanes[START] == pytest.approx(losses(start)[: len(lanes[START])], abs=1e-6)
    assert len(lanes[START]) in (STEPS // 2, STEPS)


@pytest.mark.parametrize(("winner", "without"), [("NIO", {"nio_race_steps": 0}), (START, {"nio": False})])
def test_the_training_from_the_winner_is_the_same_as_without_a_race(winner, without, tmp_path, monkeypatch):
    let_win(winner, monkeypatch)
    raced, plain = trained(tmp_path / "raced"), trained(tmp_path / "plain", **without)
    result, expected = raced.nio_result, plain.nio_result
    assert result.race.winner == winner
    assert losses(raced) == losses(plain)
    assert same_weights(raced, plain)
    if winner == START:
        assert set(result.scales.values()) == {1.0}
        assert (result.status, result.after) == ("unchanged", result.before)
    else:
        assert result.status == "changed"
        assert (result.scales, result.groups, result.after) == (expected.scales, expected.groups, expected.after)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["NIO", START]),
        ({"nio_search": "published", "nio_iterations": 2, "nio_lr": 0.05}, ["NIO", START]),
        ({"nio_method": "range", "nio_method_kwargs": {"factor": 2.0}}, ["another range", START]),
        ({"nio_least_norm": 1.0}, None),
    ],
    ids=["computed", "published", "baseline", "refused"],
)
def test_the_weights_that_were_found_race_the_start(changes, names, tmp_path):
    race = trained(tmp_path, nio_race_steps=2, max_steps=3, **changes).nio_result.race
    assert (None if race is None else [lane.name for lane in race.lanes]) == names


def test_an_initialisation_that_harms_loses_and_what_is_saved_and_reported_is_that_of_the_winner(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer = trained(tmp_path, **FAR_OFF)
    result = trainer.nio_result
    race = result.race
    assert race.winner == START
    assert same_weights(trainer, trained(tmp_path / "plain", nio=False))
    saved = load_state(tmp_path / "_nio_init")
    assert saved.race == race
    assert set(saved.scales.values()) == {1.0}
    assert race.message in caplog.text
    assert race.message in result.message
    assert race.cost == sum(len(lane.losses) for lane in race.lanes) > 0
    assert ("Training steps of the race", "", f"{race.cost}") in summary_rows(result, {})
    run = Run(name="x", facts=trainer.run_facts(), result=result)
    assert f"and {race.cost} steps of the training for the race" in cost_text(run, result)
    entry = next(entry for entry in trainer.state.log_history if "nio_cost" in entry)
    assert entry["nio_race_cost"] == race.cost
    again = InitResult.from_dict(json.loads(json.dumps(result.to_dict())))
    assert again.race == race


class Logging(NIOTrainer):
    """Counts and logs what it computes, as trainers of language models do."""

    def __init__(self, *args, **kwargs):
        self.seen = []
        self.total = 0
        super().__init__(*args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        self.seen.append(self.state.global_step)
        self.total += 1
        return super().compute_loss(*args, **kwargs)

    def log(self, logs, *args, **kwargs):
        super().log({**logs, "seen": len(self.seen), "total": self.total}, *args, **kwargs)


class Calls(TrainerCallback):
    """Counts its calls."""

    def __init__(self):
        self.steps = self.beginnings = 0

    def on_train_begin(self, *args, **kwargs):
        self.beginnings += 1

    def on_step_end(self, *args, **kwargs):
        self.steps += 1


def test_lanes_leave_no_trace_in_the_training(tmp_path, monkeypatch):
    let_win("NIO", monkeypatch)
    logs = {}
    for steps in (0, STEPS):
        calls = Calls()
        evaluating = {"eval_dataset": ToyImages(16), "eval_strategy": "steps", "eval_steps": 3}
        trainer = trained(tmp_path / str(steps), Logging, callbacks=[calls], nio_race_steps=steps, **evaluating)
        assert (calls.beginnings, calls.steps) == (1, 20)
        dropped = ("seconds", "runtime", "per_second", "race")
        logs[steps] = [
            {key: value for key, value in entry.items() if not any(word in key for word in dropped)}
            for entry in trainer.state.log_history
        ]
        assert sorted(file.name for file in (tmp_path / str(steps)).iterdir()) == ["_nio_init"]
    assert logs[0] == logs[STEPS]


@pytest.mark.parametrize("lanes", [0, 1])
def test_a_race_that_was_interrupted_is_held_anew_and_ends_alike(lanes, tmp_path):
    whole = trained(tmp_path / "whole")
    with pytest.raises(Interruption):
        trained(tmp_path / "broken", disturbed(lanes * STEPS + 3, interrupt))
    again = trained(tmp_path / "broken", Counting, resume=AUTO)
    assert again.losses == 0, "NIO was over"
    assert again.nio_result.race == whole.nio_result.race
    assert same_weights(again, whole)


def test_a_race_that_is_over_is_not_held_again(tmp_path):
    first = trained(tmp_path, **FAR_OFF)
    again = trained(tmp_path, disturbed(20 + 1, interrupt), resume=AUTO, **FAR_OFF)
    assert again.nio_result.race == first.nio_result.race
    assert same_weights(again, first)


def test_a_race_of_other_arguments_is_held_anew(tmp_path):
    with pytest.raises(Interruption):
        trained(tmp_path, disturbed(STEPS + 3, interrupt))
    again = trained(tmp_path, resume=AUTO, learning_rate=3e-3)
    assert same_weights(again, trained(tmp_path / "b", learning_rate=3e-3))


def test_sigterm_in_a_race_ends_it(tmp_path):
    with pytest.raises(Preempted, match="during the race, stopped after 3 steps"):
        trained(tmp_path, disturbed(3, terminate), enable_jit_checkpoint=True)
    again = trained(tmp_path, resume=AUTO, enable_jit_checkpoint=True)
    assert same_weights(again, trained(tmp_path / "whole"))


def test_a_race_is_held_once_with_a_model_init_and_not_on_resume(tmp_path, monkeypatch):
    let_win("NIO", monkeypatch)
    saving = {"model_init": lambda: build("vit"), "save_strategy": "steps", "save_steps": 10}
    plain = trained(tmp_path / "plain", nio_race_steps=0, **saving)
    raced = trained(tmp_path / "raced", **saving)
    assert len(raced.nio_result.race.lanes) > 1
    resumed = trained(tmp_path / "raced", resume=str(tmp_path / "raced" / "checkpoint-10"), **saving)
    assert resumed.nio_result is None
    assert same_weights(plain, raced, resumed)


def test_a_race_may_be_held_by_hand(tmp_path):
    trainer = trainer_of(tmp_path, **FAR_OFF)
    assert trainer.run_race() is None
    trainer.run_nio()
    result = trainer.run_race()
    assert result.race.winner == START
    assert trainer.run_race() is None
    assert same_weights(trainer, trainer_of(tmp_path))
    trainer.train()
    assert trainer.nio_result is result


class NotANumber(NIOTrainer):
    """Its loss is NaN from the third step on, from large weights."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        large = sum(parameter.detach().norm() for parameter in model.parameters()) > 1e3
        return loss * float("nan") if large and self.state.global_step >= 2 else loss


def test_a_lane_whose_loss_is_no_number_loses(tmp_path):
    race = trained(tmp_path, NotANumber, **FAR_OFF).nio_result.race
    assert (race.winner, [len(lane.losses) for lane in race.lanes]) == (START, [2, STEPS])


class Stream(IterableDataset):
    """A stream of images that has a length of its own and, where it changes, gives others each time."""

    def __init__(self, changes):
        self._passes = 0
        self._changes = changes

    def __iter__(self):
        self._passes += self._changes
        images = ToyImages(640)
        for number in range(640):
            sample = images[number]
            yield {**sample, "pixel_values": sample["pixel_values"] + self._passes}


def test_lanes_that_are_given_other_batches_are_refused(tmp_path):
    assert trained(tmp_path / "same", train_dataset=Stream(changes=False)).nio_result.race.lanes
    with pytest.raises(DataError, match=r"train_dataset: the lane of .* was given other batches.*Give data"):
        trained(tmp_path / "other", train_dataset=Stream(changes=True))


class OneUse:
    """A stream that is its own iterator."""

    def __iter__(self):
        return self

    def __next__(self):
        raise StopIteration


def test_a_race_that_cannot_be_held_is_refused_before_nio(tmp_path):
    trainer = trainer_of(tmp_path, nio_race_steps=20)
    with refused(trainer, ConfigError, "nio_race_steps: 20, and the training has 20 steps"):
        trainer.train()
    model = build("vit")
    trainer = trainer_of(tmp_path, model=model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None))
    with refused(trainer, ConfigError, r"optimizers=.*optimizer_cls_and_kwargs"):
        trainer.train()
    trainer.args.nio_race_steps = None
    assert planned_steps(trainer, 10**6) == 0, "by itself there is no race"
    trainer = trainer_of(tmp_path)
    trainer.train_dataset = OneUse()
    with pytest.raises(ConfigError, match="a stream that can be read only once"):
        planned_steps(trainer, 100)


@pytest.mark.parametrize(("max_steps", "expected"), [(11_999, 0), (12_000, races.RACE_STEPS)])
def test_by_default_a_race_is_held_where_it_is_two_per_cent_of_the_training(max_steps, expected, tmp_path):
    trainer = trainer_of(tmp_path, nio_race_steps=None)
    assert planned_steps(trainer, max_steps) == expected
    trainer.args.nio = False
    assert planned_steps(trainer, max_steps) == 0


def test_out_of_memory_ends_the_race_and_only_one_that_was_asked_for_the_training(tmp_path, monkeypatch, caplog):
    def fail():
        raise torch.OutOfMemoryError("tried to allocate much")

    with pytest.raises(NIOMemoryError, match="nio_race_steps=0"):
        trained(tmp_path / "asked", disturbed(1, fail))
    monkeypatch.setattr(races, "RACE_STEPS", 4)
    monkeypatch.setattr(races, "LARGEST_SHARE", 1.0)
    trainer = trained(tmp_path / "by itself", disturbed(1, fail), nio_race_steps=None)
    assert "There is no race. the race: out of memory" in caplog.text
    assert same_weights(trainer, trained(tmp_path / "without", nio_race_steps=0))


def test_a_lane_is_behind_by_more_than_its_noise():
    noise = [0.1 * (-1) ** step for step in range(40)]
    level = [2.0] * 40
    assert not is_behind([2 + more for more in noise], level)
    assert is_behind([2.2 + more for more in noise], level)
    assert not is_behind([1.8 + more for more in noise], level)
    # What lies before the last quarter does not count.
    assert not is_behind([9.0] * 30 + [2 + more for more in noise[:10]], level)
    assert not is_behind([3.0], [2.0])


def test_the_leader_has_the_lowest_loss_of_those_that_came_to_the_end():
    slow, fast, stopped = (
        Lane("slow", (9.0, 3.0, 3.0, 3.0)),
        Lane("fast", (9.0, 9.0, 9.0, 2.0)),
        Lane("stopped", (0.0,)),
    )
    assert leader([slow, stopped, fast, dataclasses.replace(fast, name="equal")], 4) == fast
    assert leader([stopped], 4) is None
    assert fast.loss == 2.0
    assert Lane("long", tuple(map(float, range(8)))).loss == statistics.fmean([6, 7])
