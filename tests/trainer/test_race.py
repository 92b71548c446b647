"""The race: what its lanes are, who wins it, what it leaves behind, and how it goes on."""

import dataclasses
import json
import logging
import statistics
from typing import Any

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
from tests.trainer.toys import Interruption, ToyImages, arguments, build, load_state, snapshot, unchanged

STEPS = 8
FAR_OFF = {"nio_method": "range", "nio_method_kwargs": {"factor": 300.0}}
"""An initialisation that harms the training."""


def _arguments(folder, **changes):
    settings = {"max_steps": 20, "learning_rate": 1e-3, "logging_steps": 1, "nio_race_steps": STEPS}
    return arguments(folder, **{**settings, **changes})


def _trained(folder, model=None, **changes):
    model = build("vit") if model is None else model
    trainer = NIOTrainer(model=model, args=_arguments(folder, **changes), train_dataset=ToyImages())
    trainer.train()
    return trainer


def _losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _race(trainer):
    assert trainer.nio_result is not None
    assert trainer.nio_result.race is not None
    return trainer.nio_result.race


def _let_win(name, monkeypatch):
    monkeypatch.setattr(races, "leader", lambda lanes, steps: next((lane for lane in lanes if lane.name == name), None))


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


@pytest.mark.parametrize("way", WAYS)
def test_a_lane_is_the_beginning_of_the_training_from_its_weights(way, tmp_path):
    raced = _trained(tmp_path / "raced", **WAYS[way])
    without = _trained(tmp_path / "without", nio_race_steps=0, **WAYS[way])
    start = _trained(tmp_path / "start", nio=False, **WAYS[way])
    race = _race(raced)
    lanes = {lane.name: list(lane.losses) for lane in race.lanes}
    assert lanes["NIO"] == pytest.approx(_losses(without)[:STEPS], abs=1e-6)
    assert lanes[START] == pytest.approx(_losses(start)[: len(lanes[START])], abs=1e-6)
    assert len(lanes[START]) in (STEPS // 2, STEPS)


@pytest.mark.parametrize("winner", ["NIO", START])
def test_the_training_from_the_winner_is_the_same_as_without_a_race(winner, tmp_path, monkeypatch):
    _let_win(winner, monkeypatch)
    raced = _trained(tmp_path / "raced")
    monkeypatch.undo()
    result = raced.nio_result
    assert result is not None
    assert _race(raced).winner == winner
    changes = {"NIO": {"nio_race_steps": 0}, START: {"nio": False}}
    plain = _trained(tmp_path / "plain", **changes[winner])
    assert _losses(raced) == _losses(plain)
    assert unchanged(snapshot(raced.model), snapshot(plain.model))
    if winner != START:
        assert plain.nio_result is not None
        assert result.status == "changed"
        assert (result.scales, result.groups) == (plain.nio_result.scales, plain.nio_result.groups)
        assert result.after == plain.nio_result.after
    else:
        assert set(result.scales.values()) == {1.0}
        assert (result.status, result.after) == ("unchanged", result.before)


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
    trainer = _trained(tmp_path, nio_race_steps=2, max_steps=3, **changes)
    assert trainer.nio_result is not None
    race = trainer.nio_result.race
    assert (None if race is None else [lane.name for lane in race.lanes]) == names


def test_an_initialisation_that_harms_loses(tmp_path):
    raced, harmed, plain = (
        _trained(tmp_path / "raced", **FAR_OFF),
        _trained(tmp_path / "harmed", nio_race_steps=0, **FAR_OFF),
        _trained(tmp_path / "plain", nio=False),
    )
    assert _race(raced).winner == START
    assert _losses(harmed)[-1] > 2 * _losses(plain)[-1]
    assert unchanged(snapshot(raced.model), snapshot(plain.model))


def test_what_is_saved_and_reported_is_that_of_the_winner(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer = _trained(tmp_path, **FAR_OFF)
    race, result = _race(trainer), trainer.nio_result
    assert result is not None
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


class Counting(NIOTrainer):
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
    _let_win("NIO", monkeypatch)
    logs = {}
    for steps in (0, STEPS):
        calls = Calls()
        args = _arguments(tmp_path / str(steps), nio_race_steps=steps, eval_strategy="steps", eval_steps=3)
        given = {"train_dataset": ToyImages(), "eval_dataset": ToyImages(16), "callbacks": [calls]}
        trainer = Counting(model=build("vit"), args=args, **given)
        trainer.train()
        assert (calls.beginnings, calls.steps) == (1, 20)
        dropped = ("seconds", "runtime", "per_second", "race")
        logs[steps] = [
            {key: value for key, value in entry.items() if not any(word in key for word in dropped)}
            for entry in trainer.state.log_history
        ]
        assert sorted(file.name for file in (tmp_path / str(steps)).iterdir()) == ["_nio_init"]
    assert logs[0] == logs[STEPS]


def _interrupted(folder, lanes, monkeypatch, **changes):
    """A training that ends in the middle of the lane that follows on some others."""
    made = [0]
    begin = races._Watch.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        begin(self, args, state, control, **kwargs)
        made[0] += state.global_step == 1
        if made[0] > lanes and state.global_step == 3:
            raise Interruption

    monkeypatch.setattr(races._Watch, "on_step_end", on_step_end)
    with pytest.raises(Interruption):
        _trained(folder, **changes)
    monkeypatch.undo()


@pytest.mark.parametrize("lanes", [0, 1])
def test_a_race_that_was_interrupted_is_held_anew_and_ends_alike(lanes, tmp_path, monkeypatch):
    whole = _trained(tmp_path / "whole")
    _interrupted(tmp_path / "broken", lanes, monkeypatch)
    trainer = NIOTrainer(model=build("vit"), args=_arguments(tmp_path / "broken"), train_dataset=ToyImages())
    monkeypatch.setattr("nio_hf.trainer.running.initialize", lambda *args, **kwargs: pytest.fail("NIO was over"))
    trainer.train(resume_from_checkpoint=AUTO)
    assert _race(trainer) == _race(whole)
    assert unchanged(snapshot(trainer.model), snapshot(whole.model))


def test_a_race_that_is_over_is_not_held_again(tmp_path, monkeypatch):
    first = _trained(tmp_path, **FAR_OFF)
    monkeypatch.setattr(races.Lanes, "run", lambda self: pytest.fail("held again"))
    args = _arguments(tmp_path, **FAR_OFF)
    trainer = NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages())
    trainer.train(resume_from_checkpoint=AUTO)
    assert _race(trainer) == _race(first)
    assert unchanged(snapshot(trainer.model), snapshot(first.model))


def test_a_race_of_other_arguments_is_held_anew(tmp_path, monkeypatch):
    _interrupted(tmp_path, 1, monkeypatch)
    args = _arguments(tmp_path, learning_rate=3e-3)
    trainer = NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages())
    trainer.train(resume_from_checkpoint=AUTO)
    assert unchanged(snapshot(trainer.model), snapshot(_trained(tmp_path / "b", learning_rate=3e-3).model))


def test_sigterm_in_a_race_ends_it(tmp_path, monkeypatch):
    args = _arguments(tmp_path, enable_jit_checkpoint=True)
    trainer = NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages())
    begin = races._Watch.on_step_end

    def on_step_end(self, *rest, **kwargs):
        if len(self.losses) == 2:
            assert trainer.preemption is not None
            trainer.preemption.requested = True
        begin(self, *rest, **kwargs)

    monkeypatch.setattr(races._Watch, "on_step_end", on_step_end)
    with pytest.raises(Preempted, match="during the race, stopped after 3 steps"):
        trainer.train()
    monkeypatch.undo()
    again = NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages())
    again.train(resume_from_checkpoint=AUTO)
    assert unchanged(snapshot(again.model), snapshot(_trained(tmp_path / "whole").model))


def test_a_race_is_held_once_with_a_model_init_and_not_on_resume(tmp_path, monkeypatch):
    _let_win("NIO", monkeypatch)
    ended = []
    for steps in (0, STEPS):
        args = _arguments(tmp_path / str(steps), save_strategy="steps", save_steps=10, nio_race_steps=steps)
        trainer = NIOTrainer(model_init=lambda: build("vit"), args=args, train_dataset=ToyImages())
        trainer.train()
        ended.append(snapshot(trainer.model))
    assert len(_race(trainer).lanes) > 1
    assert unchanged(*ended)
    resumed = NIOTrainer(model_init=lambda: build("vit"), args=args, train_dataset=ToyImages())
    resumed.train(resume_from_checkpoint=str(tmp_path / str(STEPS) / "checkpoint-10"))
    assert resumed.nio_result is None
    assert unchanged(snapshot(trainer.model), snapshot(resumed.model))


def test_a_race_may_be_held_by_hand(tmp_path):
    trainer = NIOTrainer(model=build("vit"), args=_arguments(tmp_path, **FAR_OFF), train_dataset=ToyImages())
    assert trainer.run_race() is None
    trainer.run_nio()
    result = trainer.run_race()
    assert _race(trainer).winner == START
    assert trainer.run_race() is None
    assert unchanged(snapshot(trainer.model), snapshot(build("vit")))
    trainer.train()
    assert trainer.nio_result is result


class NotANumber(NIOTrainer):
    """Its loss is NaN from the third step on, from large weights."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        large = sum(parameter.detach().norm() for parameter in model.parameters()) > 1e3
        return loss * float("nan") if large and self.state.global_step >= 2 else loss


def test_a_lane_whose_loss_is_no_number_loses(tmp_path):
    args = _arguments(tmp_path, **FAR_OFF)
    trainer = NotANumber(model=build("vit"), args=args, train_dataset=ToyImages())
    trainer.train()
    race = _race(trainer)
    assert (race.winner, [len(lane.losses) for lane in race.lanes]) == (START, [2, STEPS])


class Once(IterableDataset[Any]):
    """A stream of images that has a length of its own and gives others each time."""

    def __init__(self, changing):
        self._passes = 0
        self._changing = changing

    def __iter__(self):
        self._passes += self._changing
        images = ToyImages(640)
        for number in range(640):
            sample = images[number]
            yield {**sample, "pixel_values": sample["pixel_values"] + self._passes}


@pytest.mark.parametrize("changing", [False, True])
def test_lanes_that_are_given_other_batches_are_refused(changing, tmp_path):
    trainer = NIOTrainer(model=build("vit"), args=_arguments(tmp_path), train_dataset=Once(changing))
    if not changing:
        trainer.train()
        assert _race(trainer).lanes
        return
    with pytest.raises(DataError, match=r"train_dataset: the lane of .* was given other batches.*Give data"):
        trainer.train()


class OneUse:
    """A stream that is its own iterator."""

    def __iter__(self):
        return self

    def __next__(self):
        raise StopIteration


REFUSED = {
    "longer than the training": ({"nio_race_steps": 20}, "nio_race_steps: 20, and the training has 20 steps"),
    "much longer": ({"nio_race_steps": 500}, "nio_race_steps: 500, and the training has 20 steps"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_race_that_cannot_be_held_is_refused_before_nio(case, tmp_path):
    changes, found = REFUSED[case]
    model = build("vit")
    trainer = NIOTrainer(model=model, args=_arguments(tmp_path, **changes), train_dataset=ToyImages())
    with pytest.raises(ConfigError, match=found):
        trainer.train()
    assert unchanged(snapshot(model), snapshot(build("vit")))
    assert trainer.nio_result is None


@pytest.mark.parametrize("value", [-1, 1.5, True, "ten"])
def test_steps_that_are_no_number_of_steps_are_refused(value, tmp_path):
    with pytest.raises(ConfigError, match=r"nio_race_steps: .*Give a whole number, 0 for none"):
        _arguments(tmp_path, nio_race_steps=value)


def test_an_optimizer_of_the_user_is_refused_and_by_itself_there_is_no_race(tmp_path):
    model = build("vit")
    own = (torch.optim.SGD(model.parameters(), lr=0.1), None)
    args = _arguments(tmp_path)
    trainer = NIOTrainer(model=model, args=args, train_dataset=ToyImages(), optimizers=own)
    with pytest.raises(ConfigError, match=r"optimizers=.*optimizer_cls_and_kwargs"):
        trainer.train()
    args.nio_race_steps = None
    assert planned_steps(trainer, 10**6) == 0


def test_a_stream_that_can_be_read_once_is_refused(tmp_path):
    trainer = NIOTrainer(model=build("vit"), args=_arguments(tmp_path), train_dataset=ToyImages())
    trainer.train_dataset = OneUse()
    with pytest.raises(ConfigError, match="a stream that can be read only once"):
        planned_steps(trainer, 100)


@pytest.mark.parametrize(("max_steps", "expected"), [(11_999, 0), (12_000, races.RACE_STEPS)])
def test_by_default_a_race_is_held_where_it_is_two_per_cent_of_the_training(max_steps, expected, tmp_path):
    args = _arguments(tmp_path, nio_race_steps=None)
    trainer = NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages())
    assert planned_steps(trainer, max_steps) == expected
    args.nio = False
    assert planned_steps(trainer, max_steps) == 0


@pytest.mark.parametrize("asked", [None, STEPS])
def test_out_of_memory_ends_the_race_and_only_one_that_was_asked_for_the_training(asked, tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise torch.OutOfMemoryError("tried to allocate much")

    monkeypatch.setattr(races, "RACE_STEPS", 4)
    monkeypatch.setattr(races, "LARGEST_SHARE", 1.0)
    monkeypatch.setattr(races, "_lane_trainer", fail)
    args = _arguments(tmp_path, nio_race_steps=asked)
    trainer = NIOTrainer(model=build("vit"), args=args, train_dataset=ToyImages())
    if asked is None:
        trainer.train()
        assert "There is no race. the race: out of memory" in caplog.text
        assert unchanged(snapshot(trainer.model), snapshot(_trained(tmp_path / "b", nio_race_steps=0).model))
        return
    with pytest.raises(NIOMemoryError, match="nio_race_steps=0"):
        trainer.train()


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
