"""SIGTERM during a training: a whole checkpoint, an exit status, and the same weights after the next start."""

import dataclasses
import functools
import os
import signal

import pytest
import torch

from nio_hf.durable import GO_ON
from nio_hf.durable.manifest import candidates, fault_of, newest_usable
from nio_hf.durable.preemption import SpareWorkers, preempted_at_once
from nio_hf.errors import Preempted
from nio_hf.hub.run_folder import INIT_DIR_NAME
from tests.durable import trainings
from tests.durable.trainings import Counting, Notes, steps_saved, terminate
from tests.trainer.toys import PUBLISHED, At, ToyImages, refused, same_weights

EPOCH, STEPS = 4, 6
BEST = {**trainings.BEST, "eval_steps": 2, "save_steps": 2}


@pytest.fixture(autouse=True)
def terminations():
    """Signals that reach the former handler, which is installed again after each test."""
    received = []

    def former(number, frame):
        received.append(number)

    before = signal.signal(signal.SIGTERM, former)
    yield received
    assert signal.signal(signal.SIGTERM, before) is former


def sigterm(step, event="on_step_begin"):
    """Send SIGTERM to this process in a step, once."""
    return At(event, terminate, step if event in ("on_step_end", "on_epoch_end") else step - 1)


class Fourth(Counting):
    """Finds the fourth step the best."""

    best_step = 4


SETTINGS = {"enable_jit_checkpoint": True, "nio": False, "max_steps": STEPS, "learning_rate": 1e-2, "dropout": 0.1}
SETTINGS |= {"trainer_class": Fourth, "train_dataset": ToyImages(8 * EPOCH)}
make = functools.partial(trainings.make, **SETTINGS)
trained = functools.partial(trainings.trained, **SETTINGS)


def stopped(output_dir, *callbacks, **changes):
    trainer = make(output_dir, callbacks=[*callbacks], **changes)
    with pytest.raises(Preempted):
        trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("step", "event"),
    [
        *((step, "on_step_begin") for step in (1, EPOCH, EPOCH + 1, STEPS)),
        *((3, event) for event in ("on_substep_end", "on_pre_optimizer_step", "on_step_end")),
    ],
)
def test_the_step_is_finished_saved_and_gone_on_from(step, event, tmp_path):
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    whole, seen, checkpoint = trained(tmp_path / "whole", **settings), Notes(), tmp_path / "run" / f"checkpoint-{step}"
    saving = {"save_strategy": "steps", "save_steps": step} if event == "on_step_begin" else {"save_strategy": "no"}
    assert stopped(tmp_path / "run", sigterm(step, event), seen, **saving, **settings).state.global_step == step
    assert steps_saved(tmp_path / "run") == [step]
    assert fault_of(checkpoint) is None
    assert "average/notes.txt" in (checkpoint / "nio_manifest.json").read_text()
    assert seen.saved == [step], "once, also where it is due"
    resumed = trained(tmp_path / "run", resume="auto", **settings)
    assert resumed.state.global_step == STEPS
    assert same_weights(whole, resumed)


def test_a_process_reacts_in_each_training_of_each_trainer_and_goes_on(tmp_path):
    whole = trained(tmp_path / "whole")
    first, second = (make(tmp_path / name, callbacks=[sigterm(2)]) for name in ("first", "second"))
    for trainer in (first, second):
        with pytest.raises(SystemExit) as raised:
            trainer.train()
        assert isinstance(raised.value, Preempted)
        assert raised.value.code == 75
        assert str(raised.value) == f"SIGTERM: saved and stopped at step 2. {GO_ON}"
    first.train(resume_from_checkpoint="auto")
    assert same_weights(whole, first)
    late = sigterm(STEPS, "on_epoch_end")
    second.add_callback(late)
    second.train(resume_from_checkpoint="auto")
    assert (late.is_done, second.state.global_step) == (True, STEPS), "behind the last step there is nothing to stop"


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
@pytest.mark.parametrize("step", [3, EPOCH])
def test_an_evaluation_that_is_left_out_changes_no_weight(step, strategy, tmp_path):
    settings = {"eval_strategy": strategy, "eval_steps": 2, "save_strategy": strategy}
    whole, seen = trained(tmp_path / "whole", **settings), Notes()
    stopped(tmp_path / "run", sigterm(step), seen, **settings)
    assert step not in seen.evaluated
    assert seen.saved == [step], "nothing is done of the end of an epoch that was not reached"
    assert same_weights(whole, trained(tmp_path / "run", resume="auto", **settings))


def test_a_learning_rate_that_depends_on_evaluations_stays_the_same(tmp_path):
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1, "dropout": 0.0}
    settings["lr_scheduler_kwargs"] = {"patience": 0, "threshold": 0.5}
    whole = trained(tmp_path / "whole", **settings)
    stopped(tmp_path / "run", sigterm(2), **settings)
    resumed = trained(tmp_path / "run", resume="auto", **settings)
    logs = [trainer.state.log_history for trainer in (whole, resumed)]
    rates = [[entry["learning_rate"] for entry in log if "learning_rate" in entry] for log in logs]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 2


@pytest.mark.parametrize("step", [3, EPOCH, EPOCH + 1])
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_best_checkpoint_is_that_of_the_uninterrupted_run(strategy, step, tmp_path):
    settings = {**BEST, "eval_strategy": strategy, "save_strategy": strategy}
    whole, seen = trained(tmp_path / "whole", **settings), Notes()
    stopped(tmp_path / "run", sigterm(step), seen, **settings)
    assert (step in seen.evaluated) == (step == EPOCH if strategy == "epoch" else step % 2 == 0)
    assert fault_of(tmp_path / "run" / f"checkpoint-{step}") is None
    resumed = trained(tmp_path / "run", resume="auto", **settings)
    assert resumed.state.best_global_step == whole.state.best_global_step
    assert same_weights(whole, resumed)


@pytest.mark.parametrize("load_best", [True, False])
@pytest.mark.parametrize(("strategy", "limit"), [("steps", 1), ("epoch", None)])
def test_it_saves_also_where_only_the_best_is_saved_and_keeps_the_settings(strategy, limit, load_best, tmp_path):
    choosing = {**BEST, "eval_strategy": strategy, "save_strategy": "best", "load_best_model_at_end": load_best}
    settings = {**choosing, "greater_is_better": True, "save_total_limit": limit}
    trainer = stopped(tmp_path, sigterm(EPOCH), **settings)
    assert newest_usable(candidates(tmp_path)) == tmp_path / "checkpoint-4"
    saved = torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False)
    for args in (saved, trainer.args):
        assert (args.save_strategy, args.save_total_limit) == ("best", limit)


def test_the_end_of_a_stopped_training_does_not_delete_its_checkpoint(tmp_path):
    settings = {**BEST, "eval_strategy": "steps", "save_strategy": "steps", "save_total_limit": 1}
    assert str(stopped(tmp_path, sigterm(3), **settings).state.best_model_checkpoint).endswith("checkpoint-2")
    assert newest_usable(candidates(tmp_path)) == tmp_path / "checkpoint-3"


class NIOThatIsStopped(Counting):
    """Gets SIGTERM before computed scales are tried, or after the first iteration of the published search."""

    def compute_nio_loss(self, *args, **kwargs):
        if self.losses == (20 if self.args.nio_search == "published" else 5):
            terminate()
        return super().compute_nio_loss(*args, **kwargs)


@pytest.mark.parametrize("search", [{}, PUBLISHED], ids=["computed", "published"])
def test_a_signal_during_nio_leaves_the_model_and_the_next_run_finds_the_same(search, tmp_path):
    whole, stopping, again = (
        make(tmp_path / name, trainer_class=kind, nio=True, **search)
        for name, kind in (("whole", Counting), ("run", NIOThatIsStopped), ("run", Counting))
    )
    with refused(stopping, Preempted, r"during NIO, stopped before it was through\. Start again") as raised:
        stopping.run_nio()
    assert raised.value.code == 75
    assert not list((tmp_path / "run").iterdir())
    expected, found = whole.run_nio(), again.run_nio(resume=True)
    assert same_weights(whole, again)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [INIT_DIR_NAME]
    for part in ("scales", "groups", "cost", "before", "after"):
        assert getattr(found, part) == getattr(expected, part)
    untimed = ([dataclasses.replace(record, seconds=0) for record in result.history] for result in (expected, found))
    assert next(untimed) == next(untimed)


def test_without_the_setting_nothing_reacts(terminations, tmp_path):
    trainer = trained(tmp_path, callbacks=[sigterm(2)], enable_jit_checkpoint=False)
    assert terminations == [signal.SIGTERM]
    assert trainer.state.global_step == STEPS
    assert steps_saved(tmp_path) == []


def test_a_signal_when_all_is_saved_ends_at_once(caplog):
    with pytest.raises(Preempted) as raised, preempted_at_once("all is saved"):
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.code == Preempted.STATUS
    assert "all is saved" in caplog.text


def test_a_worker_survives_one_signal_and_no_second_one():
    former, numbers = signal.getsignal(signal.SIGTERM), []
    try:
        SpareWorkers(numbers.append)(3)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, former)
    assert numbers == [3]
