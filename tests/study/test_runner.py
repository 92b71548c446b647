"""The processes and the directory of a study."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nio_hf.errors import ConfigError, Problem, RecipeError
from nio_hf.metrics import ACCURACY, LOSS
from nio_hf.recipe.loading import load_recipe
from nio_hf.study import runner
from nio_hf.study.arms import choose_arms
from nio_hf.study.plan import Run
from nio_hf.study.runner import RunError, Study, execute
from nio_hf.study.worker import Order
from tests.study.outcomes import outcome, plan

RECIPE = load_recipe("vit-tiny/digits/nio")
RUN = Run("selection", "nio", 1e-3, 0.0, 0)
PROGRAM = """
import multiprocessing, os, pathlib, sys, time
from nio_hf.study.worker import end_with_parent

def work(file):
    end_with_parent()
    pathlib.Path(file).write_text(str(os.getpid()))
    time.sleep(120)

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    context.Process(target=work, args=(sys.argv[1],), daemon=True).start()
    time.sleep(120)
"""


def _study(directory, made, **more):
    return Study(RECIPE, made, directory, (), {}, **more)


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or ") Z " not in status.read_text()


def test_a_run_ends_with_the_process_that_started_it(tmp_path):
    program, file = tmp_path / "program.py", tmp_path / "pid"
    program.write_text(PROGRAM, encoding="utf-8")
    with subprocess.Popen([sys.executable, str(program), str(file)]) as process:
        deadline = time.monotonic() + 120
        while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        pid = int(file.read_text())
        assert _runs(pid)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    deadline = time.monotonic() + 20
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(pid)


def test_folders_of_trainings_that_were_killed_are_removed_and_nobody_else_writes(tmp_path):
    study = _study(tmp_path, plan())
    (study.runs / ".nio-trial-before").mkdir(parents=True)
    (study.runs / "probe.log").touch()
    with study.opened(1):
        assert [path.name for path in study.runs.iterdir()] == ["probe.log"]
        with pytest.raises(RecipeError, match="another process is at work in it"), _study(tmp_path, plan()).opened(1):
            pass
        assert Path(str(study.order_for(RUN).recipe.training.output_dir)).is_dir()
    assert [path.name for path in study.runs.iterdir()] == ["probe.log"]
    with study.opened(1):
        pass


def test_the_problems_of_all_arms_are_reported_at_once(tmp_path):
    definitions = ["low=nio,nio_gama=1", "high=nio,nio_loss_bound=-1", "other=gradinit,nio_method_kwargs.steps=3"]
    with pytest.raises(RecipeError) as raised:
        _study(tmp_path, plan(arms=choose_arms(["no_warmup", "warmup", "gradinit", "lsuv"], definitions)))
    places = ["arm low, nio_gama", "arm high, nio_loss_bound", "arm other, nio_method_kwargs.steps"]
    assert [problem.where for problem in raised.value.problems] == places


def test_a_process_is_handed_the_whole_recipe(tmp_path):
    made = plan(steps=200, arms=choose_arms(["warmup"], ["long=gradinit,nio_method_kwargs.iterations=60"]))
    recipe = RECIPE.replace({"data_seed": 7, "nio_seed": 3, "eval_from_train": True})
    study = Study(recipe, made, tmp_path, (), {}, jobs=1000)
    with study.opened(1):
        order = study.order_for(Run("selection", "long", 5e-4, 0.0, 2))
        judged = study.order_for(Run("verdict", "warmup", 2e-3, 0.1, 1000))
    training = order.recipe.training
    assert training.nio_method_kwargs == {"iterations": 60, "lr": 0.03}
    assert (training.learning_rate, training.seed, training.max_steps) == (5e-4, 2, 200)
    assert (order.threads, order.cost_share) == (1, 1)
    assert order.recipe.data.eval_from_train is True
    assert (training.data_seed, training.nio_seed) == (None, None)
    assert (judged.recipe.training.warmup_steps, judged.recipe.data.eval_from_train) == (20, False)


def test_an_arm_whose_initialisation_may_cost_the_whole_budget_is_refused(tmp_path):
    _study(tmp_path, plan(steps=26, warmup_ratios=(0.1,)))
    with pytest.raises(RecipeError, match=r"^arm nio, --steps: 25, where the initialisation takes up to 25 training"):
        _study(tmp_path, plan(steps=25, warmup_ratios=(0.1,)))


def _work(order, sender):
    """Stand for `carry_out`, by the name of the log."""
    kind = order.log_file.stem
    if kind == "dies":
        order.log_file.write_text("what it said last\n", encoding="utf-8")
        os._exit(9)
    sender.send(ConfigError(Problem("--steps", "1", "Give more")) if kind == "refuses" else outcome(50.0))


@pytest.mark.parametrize(
    ("kind", "error", "found"),
    [
        ("dies", RunError, r"run selection-nio-lr0.001-s0: ended with status 9 and without a result\n    what it said"),
        ("refuses", RecipeError, r"run selection-nio-lr0.001-s0, --steps: 1\. Give more"),
        ("ends", None, ""),
    ],
)
def test_what_becomes_of_a_process(kind, error, found, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "carry_out", _work)
    ended = {}
    order = Order(RECIPE.replace({"output_dir": str(tmp_path / "folder")}), tmp_path / f"{kind}.log")
    if error is None:
        execute([RUN], lambda run: order, 2, ended.__setitem__)
        assert ended == {RUN: outcome(50.0)}
        return
    with pytest.raises(error, match=found):
        execute([RUN], lambda run: order, 2, ended.__setitem__)
    assert not ended


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [
        (ACCURACY, 51.234, "accuracy 51.23%, loss 1.0000, initialisation 3.0 steps (1 s)"),
        (LOSS, 2.34567, "evaluation loss 2.3457, initialisation 3.0 steps (1 s)"),
        (LOSS, None, "failed, the loss is not finite (1 s)"),
    ],
)
def test_a_run_that_has_ended_is_told_by_its_metric(metric, value, said, tmp_path, monkeypatch, capsys):
    ended = outcome(value, cost_steps=3.0)
    monkeypatch.setattr(runner, "execute", lambda runs, order_for, jobs, note: note(RUN, ended))
    monkeypatch.setattr(type(RECIPE), "metric", metric)
    study = _study(tmp_path, plan())
    with study.opened(1):
        study.complete([RUN])
    assert capsys.readouterr().err == f"[1/1] {RUN.name}: {said}\n"
    again = _study(tmp_path, plan(), diagnostics=True)
    monkeypatch.setattr(runner, "execute", lambda runs, order_for, jobs, note: None)
    with again.opened(1):
        again.complete([RUN])
    told = capsys.readouterr().err
    assert "1 runs are known already." in told
    assert ("1 of them have no diagnostics" in told) == (value is not None)
    assert again.outcomes == study.outcomes
