"""SIGTERM in the middle of a training: a whole checkpoint, a status, and the same weights after the next start."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from nio_hf import NIOTrainer
from nio_hf.durable.manifest import candidates, fault_of, newest_usable
from nio_hf.durable.preemption import SpareWorkers, preempted_at_once
from nio_hf.errors import Preempted
from nio_hf.hub.run_folder import INIT_DIR_NAME
from nio_hf.trainer.checkpoints import PROGRESS_NAME
from tests.trainer.toys import ToyImages, arguments, build, snapshot, unchanged

Weights = dict[str, torch.Tensor]
STEPS_PER_EPOCH = 4
STEPS = 6
SEARCHES: dict[str, dict[str, Any]] = {
    "computed": {},
    "published": {"nio_search": "published", "nio_groups": "tensor", "nio_iterations": 5, "nio_lr": 0.05},
}


class Sigterm(TrainerCallback):
    """Sends SIGTERM to its own process, in the step or at the event that is asked for, once."""

    def __init__(self, step: int, event: str = "on_step_begin") -> None:
        self.at = step if event in ("on_step_end", "on_epoch_end") else step - 1
        self.sent = False
        setattr(self, event, self._send)

    def _send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at and not self.sent:
            self.sent = True
            _terminate()


class Evaluations(TrainerCallback):
    """Remembers after which steps there was an evaluation or a save."""

    def __init__(self) -> None:
        self.evaluated: list[int] = []
        self.saved: list[int] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated.append(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved.append(state.global_step)


class Notes(TrainerCallback):
    """Writes into every checkpoint."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / "notes.txt").write_text("of a callback")


@pytest.fixture(autouse=True)
def terminations() -> Iterator[list[int]]:
    """The signals that reach the handler that was there before; after a test it is there again."""
    received: list[int] = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, former)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("step", [1, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1, STEPS])
def test_the_step_is_finished_saved_and_gone_on_from(step: int, accumulation: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    whole = _trained(tmp_path / "whole", **settings)
    stopped = _stopped(tmp_path / "run", Sigterm(step), **settings)
    assert stopped.state.global_step == step
    assert _checkpoints(tmp_path / "run") == [f"checkpoint-{step}"]
    assert fault_of(tmp_path / "run" / f"checkpoint-{step}") is None
    resumed = _trained(tmp_path / "run", resume="auto", **settings)
    assert resumed.state.global_step == STEPS
    assert unchanged(snapshot(whole.model), snapshot(resumed.model))


@pytest.mark.parametrize("event", ["on_substep_end", "on_pre_optimizer_step", "on_step_end"])
def test_a_signal_anywhere_in_a_step_does_not_split_it(event: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    whole = _trained(tmp_path / "whole", **settings)
    stopped = _stopped(tmp_path / "run", Sigterm(3, event), **settings)
    assert stopped.state.global_step == 3
    resumed = _trained(tmp_path / "run", resume="auto", **settings)
    assert unchanged(snapshot(whole.model), snapshot(resumed.model))


def test_it_is_a_system_exit_with_the_status_that_asks_to_try_again(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as raised:
        _trainer(tmp_path, callbacks=[Sigterm(2)]).train()
    assert isinstance(raised.value, Preempted)
    assert raised.value.code == 75
    expected = "SIGTERM: saved and stopped at step 2. Start again with resume_from_checkpoint=auto to go on."
    assert str(raised.value) == expected


def test_it_saves_where_nothing_else_is_saved_and_what_callbacks_write(tmp_path: Path) -> None:
    _stopped(tmp_path, Sigterm(2), Notes(), save_strategy="no")
    checkpoint = tmp_path / "checkpoint-2"
    assert fault_of(checkpoint) is None
    assert "notes.txt" in (checkpoint / "nio_manifest.json").read_text()


def test_a_save_that_is_due_in_that_step_is_made_once(tmp_path: Path) -> None:
    seen = Evaluations()
    _stopped(tmp_path, Sigterm(4), seen, save_strategy="steps", save_steps=2)
    assert seen.saved == [2, 4]


@pytest.mark.parametrize("step", [3, STEPS_PER_EPOCH])
def test_nothing_of_the_end_of_an_epoch_is_done_that_was_not_reached(step: int, tmp_path: Path) -> None:
    seen = Evaluations()
    _stopped(tmp_path, Sigterm(step), seen, save_strategy="epoch", eval_strategy="epoch")
    assert seen.saved == [step]
    assert seen.evaluated == []


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_an_evaluation_that_is_left_out_changes_no_weight(strategy: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"eval_strategy": strategy, "eval_steps": 2}
    whole = _trained(tmp_path / "whole", **settings)
    seen = Evaluations()
    _stopped(tmp_path / "run", Sigterm(STEPS_PER_EPOCH), seen, **settings)
    assert STEPS_PER_EPOCH not in seen.evaluated
    resumed = _trained(tmp_path / "run", resume="auto", **settings)
    assert unchanged(snapshot(whole.model), snapshot(resumed.model))


def test_a_learning_rate_that_depends_on_evaluations_stays_the_same(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "threshold": 0.5},
        "metric_for_best_model": "loss",
        "logging_steps": 1,
        "model_dropout": 0.0,
    }
    whole = _trained(tmp_path / "whole", **settings)
    _stopped(tmp_path / "run", Sigterm(2), **settings)
    resumed = _trained(tmp_path / "run", resume="auto", **settings)
    assert _rates(resumed) == _rates(whole)
    assert len(set(_rates(whole))) > 2


@pytest.mark.parametrize("step", [3, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1])
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_best_checkpoint_is_that_of_the_uninterrupted_run(strategy: str, step: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**_BEST, "eval_strategy": strategy, "save_strategy": strategy}
    whole = _trained(tmp_path / "whole", **settings)
    seen = Evaluations()
    _stopped(tmp_path / "run", Sigterm(step), seen, **settings)
    due = step == STEPS_PER_EPOCH if strategy == "epoch" else step % 2 == 0
    assert (step in seen.evaluated) == due
    assert fault_of(tmp_path / "run" / f"checkpoint-{step}") is None
    resumed = _trained(tmp_path / "run", resume="auto", **settings)
    assert resumed.state.best_global_step == whole.state.best_global_step
    assert unchanged(snapshot(whole.model), snapshot(resumed.model))


def test_the_end_of_a_stopped_training_does_not_delete_its_checkpoint(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**_BEST, "eval_strategy": "steps", "save_strategy": "steps", "save_total_limit": 1}
    stopped = _stopped(tmp_path, Sigterm(3), **settings)
    assert str(stopped.state.best_model_checkpoint).endswith("checkpoint-2")
    assert newest_usable(candidates(tmp_path)) == tmp_path / "checkpoint-3"


@pytest.mark.parametrize("load_best", [True, False])
def test_it_saves_also_where_only_the_best_is_saved(load_best: bool, tmp_path: Path) -> None:
    settings = {**_BEST, "eval_strategy": "steps", "save_strategy": "best", "load_best_model_at_end": load_best}
    _stopped(tmp_path, Sigterm(4), worse=True, **settings)
    assert newest_usable(candidates(tmp_path)) == tmp_path / "checkpoint-4"


def test_a_signal_that_comes_after_the_last_step_leaves_the_training_finished(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, callbacks=[Sigterm(STEPS, "on_epoch_end")])
    trainer.train()
    assert trainer.state.global_step == STEPS


@pytest.mark.parametrize(
    ("search", "stopped"),
    [
        ("computed", r"stopped before it was through\. Start again"),
        ("published", r"stopped after [2-4] iterations, which are saved"),
    ],
)
def test_a_signal_during_nio_leaves_the_model_and_saves_the_iterations(
    search: str, stopped: str, tmp_path: Path
) -> None:
    settings = {"nio": True, **SEARCHES[search]}
    whole = _trainer(tmp_path / "whole", **settings)
    expected = whole.run_nio()
    stopping = _trainer(tmp_path / "run", NIOThatIsStopped, **settings)
    before = snapshot(stopping.model)
    with pytest.raises(Preempted, match=f"during NIO, {stopped}") as raised:
        stopping.run_nio()
    assert raised.value.code == 75
    assert unchanged(before, snapshot(stopping.model))
    assert (tmp_path / "run" / PROGRESS_NAME).exists() == (search == "published")
    assert not (tmp_path / "run" / INIT_DIR_NAME).exists()
    resumed = _trainer(tmp_path / "run", Counting, **settings)
    assert resumed.run_nio(resume=True).scales == expected.scales
    assert (0 < resumed.losses < whole.losses) == (search == "published")
    assert unchanged(snapshot(whole.model), snapshot(resumed.model))


@pytest.mark.parametrize("search", SEARCHES)
def test_a_signal_during_the_nio_of_a_training_is_gone_on_from(search: str, tmp_path: Path) -> None:
    settings = {"nio": True, **SEARCHES[search]}
    whole = _trainer(tmp_path / "whole", **settings)
    whole.train()
    with pytest.raises(Preempted, match="during NIO"):
        _trainer(tmp_path / "run", NIOThatIsStopped, **settings).train(resume_from_checkpoint="auto")
    assert _checkpoints(tmp_path / "run") == []
    resumed = _trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint="auto")
    assert unchanged(snapshot(whole.model), snapshot(resumed.model))


def test_each_training_of_a_process_reacts(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    trainer.train()
    trainer.add_callback(Sigterm(2))
    with pytest.raises(Preempted):
        trainer.train()
    assert trainer.state.global_step == 2


def test_trainers_of_a_process_react_whichever_was_made_last(tmp_path: Path) -> None:
    first, second = (_trainer(tmp_path / name, callbacks=[Sigterm(2)]) for name in ("first", "second"))
    for trainer in (first, second):
        with pytest.raises(Preempted):
            trainer.train()
        assert trainer.state.global_step == 2


def test_a_stopped_training_goes_on_in_the_same_process(tmp_path: Path) -> None:
    whole = _trained(tmp_path / "whole")
    trainer = _stopped(tmp_path / "run", Sigterm(2))
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == STEPS
    assert unchanged(snapshot(whole.model), snapshot(trainer.model))


def test_the_former_handler_is_back_after_training(terminations: list[int], tmp_path: Path) -> None:
    former = signal.getsignal(signal.SIGTERM)
    trainer = _trainer(tmp_path)
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) is former
    os.kill(os.getpid(), signal.SIGTERM)
    assert terminations == [signal.SIGTERM]


def test_the_former_handler_is_back_after_a_training_that_was_stopped(tmp_path: Path) -> None:
    former = signal.getsignal(signal.SIGTERM)
    _stopped(tmp_path, Sigterm(2))
    assert signal.getsignal(signal.SIGTERM) is former


def test_the_former_handler_is_back_after_a_training_that_failed(tmp_path: Path) -> None:
    class Failing(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise ArithmeticError

    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ArithmeticError):
        _trainer(tmp_path, callbacks=[Failing()]).train()
    assert signal.getsignal(signal.SIGTERM) is former


@pytest.mark.parametrize("trainer_class", ["NIOThatIsStopped", "NIOTrainer"])
def test_the_former_handler_is_back_after_nio_alone(trainer_class: str, tmp_path: Path) -> None:
    former = signal.getsignal(signal.SIGTERM)
    trainer = _trainer(tmp_path, globals()[trainer_class], nio=True)
    if trainer_class == "NIOThatIsStopped":
        with pytest.raises(Preempted):
            trainer.run_nio()
    else:
        trainer.run_nio()
    assert signal.getsignal(signal.SIGTERM) is former


def test_the_former_handler_is_back_after_trainings_of_two_trainers(tmp_path: Path) -> None:
    former = signal.getsignal(signal.SIGTERM)
    for trainer in [_trainer(tmp_path / name) for name in ("first", "second")]:
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) is former


def test_without_the_setting_nothing_reacts(terminations: list[int], tmp_path: Path) -> None:
    former = signal.getsignal(signal.SIGTERM)
    trainer = _trainer(tmp_path, callbacks=[Sigterm(2)], enable_jit_checkpoint=False)
    assert signal.getsignal(signal.SIGTERM) is former
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) is former
    assert terminations == [signal.SIGTERM]
    assert trainer.state.global_step == STEPS
    assert _checkpoints(tmp_path) == []


_BEST: dict[str, Any] = {
    "eval_steps": 2,
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "step",
    "greater_is_better": False,
}


class Counting(NIOTrainer):
    """Counts the losses of NIO, and evaluates to the distance from a step."""

    losses = 0
    best_step = 4

    def compute_nio_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.losses += 1
        return super().compute_nio_loss(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        return {**metrics, "eval_step": float(abs(self.state.global_step - self.best_step))}


class NIOThatIsStopped(Counting):
    """Gets SIGTERM before computed scales are tried, or behind the first iteration of the published search."""

    def compute_nio_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.losses == (20 if self.args.nio_search == "published" else 5):
            _terminate()
        return super().compute_nio_loss(*args, **kwargs)


def _terminate() -> None:
    """Send SIGTERM to this process and let the handler, and the timer that it starts, be done."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)


def _trainer(
    output_dir: Path,
    trainer_class: Callable[..., Any] = Counting,
    callbacks: list[TrainerCallback] | None = None,
    model_dropout: float = 0.1,
    worse: bool = False,
    **changes: Any,
) -> Any:
    settings: dict[str, Any] = {
        "enable_jit_checkpoint": True,
        "nio": False,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        **changes,
    }
    dropout = {"hidden_dropout_prob": model_dropout, "attention_probs_dropout_prob": model_dropout}
    trainer = trainer_class(
        model=build("vit", num_hidden_layers=1, **dropout),
        args=arguments(output_dir, **settings),
        train_dataset=ToyImages(8 * STEPS_PER_EPOCH),
        eval_dataset=ToyImages(8),
        callbacks=callbacks,
    )
    if worse:
        trainer.best_step = 0
    return trainer


def _trained(output_dir: Path, resume: str | None = None, **changes: Any) -> Any:
    trainer = _trainer(output_dir, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def _stopped(output_dir: Path, *callbacks: TrainerCallback, **changes: Any) -> Any:
    trainer = _trainer(output_dir, callbacks=[*callbacks], **changes)
    with pytest.raises(Preempted):
        trainer.train()
    return trainer


def _checkpoints(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.glob("checkpoint-*"))


def _rates(trainer: Any) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def test_a_signal_when_all_is_saved_ends_at_once(caplog: pytest.LogCaptureFixture) -> None:
    former = signal.getsignal(signal.SIGTERM)
    with caplog.at_level(logging.WARNING), pytest.raises(Preempted) as raised, preempted_at_once("all is saved"):
        signal.raise_signal(signal.SIGTERM)
    assert raised.value.code == Preempted.STATUS
    assert "all is saved" in caplog.text
    assert signal.getsignal(signal.SIGTERM) == former


def test_a_worker_survives_one_signal_and_no_second_one() -> None:
    former = signal.getsignal(signal.SIGTERM)
    numbers: list[int] = []
    try:
        SpareWorkers(numbers.append)(3)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, former)
    assert numbers == [3]
