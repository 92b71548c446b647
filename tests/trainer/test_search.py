"""Trials of a hyper-parameter search: none reports what belongs to another."""

import pytest
from transformers import TrainerCallback

from nio_hf import NIOTrainer
from nio_hf.hub.run_folder import INIT_DIR_NAME
from tests.trainer.toys import CLASSES, ToyImages, arguments
from tests.zoo import vision_model


class FailingOnce(TrainerCallback):
    """Ends the first training of a search with an error, behind NIO."""

    def __init__(self):
        self.failed = False

    def on_step_begin(self, *args, **kwargs):
        if not self.failed:
            self.failed = True
            raise ArithmeticError("this trial fails")


class Logged(TrainerCallback):
    """Keeps what each training that came to its end has logged of NIO."""

    def __init__(self):
        self.iterations = []

    def on_train_end(self, args, state, control, **kwargs):
        self.iterations.append(sum("nio_grad_cosine" in entry for entry in state.log_history))


@pytest.mark.parametrize(("nio", "logged"), [([True, False], [0]), ([True, True], [2]), ([True, False, True], [0, 2])])
def test_a_trial_behind_one_that_failed_logs_its_own_nio_or_none(nio, logged, tmp_path):
    pytest.importorskip("optuna")
    log = Logged()
    trainer = _searching(tmp_path, [FailingOnce(), log])
    trainer.hyperparameter_search(
        lambda trial: (
            {"nio": trial.suggest_categorical("nio", [nio[trial.number]])}
            if trial.number == 0
            else {"nio": trial.suggest_categorical(f"nio_{trial.number}", [nio[trial.number]])}
        ),
        lambda metrics: metrics["eval_loss"],
        len(nio),
        "minimize",
        "optuna",
        catch=(ArithmeticError,),
    )
    assert log.iterations == logged


def test_a_training_without_nio_behind_one_that_failed_logs_none(tmp_path):
    log = Logged()
    trainer = _searching(tmp_path, [FailingOnce(), log])
    with pytest.raises(ArithmeticError):
        trainer.train()
    assert trainer.nio_result is not None
    trainer.args.nio = False
    trainer.train()
    trainer.args.nio = True
    trainer.train()
    assert log.iterations == [0, 2]


def test_each_trial_saves_and_seals_in_a_folder_of_its_own(tmp_path):
    pytest.importorskip("optuna")
    trainer = _searching(tmp_path, [], save_strategy="steps", save_steps=1)
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-3)},
        lambda metrics: metrics["eval_loss"],
        2,
        "minimize",
        "optuna",
    )
    saved = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("nio_manifest.json"))
    expected = [f"run-{number}/{name}" for number in (0, 1) for name in (INIT_DIR_NAME, "checkpoint-1")]
    assert saved == sorted(expected)


def _searching(output_dir, callbacks, **changes):
    args = arguments(output_dir, nio_search="published", nio_iterations=2, nio_report_batches=1, max_steps=1, **changes)
    data = {"train_dataset": ToyImages(), "eval_dataset": ToyImages(8)}

    def make():
        return vision_model("vit", CLASSES, num_hidden_layers=1)

    return NIOTrainer(model_init=make, args=args, callbacks=callbacks, **data)
